"""The planner on a broker and a store: it hears snapshots and loads, one of several acts, and its log replays."""

import asyncio
import io
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial

from common.adapters.memory_broker import MemoryHub
from common.adapters.memory_store import MemoryStore
from common.policy.role_control import RoleControlSettings
from common.ports.broker import Message
from common.protocol.messages import (
    Decision,
    GatewayLoad,
    ModelArrivals,
    RoleChange,
    SeenArrival,
    Snapshot,
    decode_decision,
    decode_inbox,
    encode,
)
from common.protocol.subjects import Names
from common.runtime.settings_planner import PlannerMode
from common.simulation.roles.decision_log import replay
from common.simulation.roles.role_controller import ControllerSettings
from common.values.ids import GatewayId, WorkerId
from common.values.worker import Role, WorkerSnapshot
from services.planner.planner_service import PlannerService
from tests.example_messages import MEASURED, MODEL

NAMES = Names("test")
LOOK_S = 0.02
SETTINGS = ControllerSettings(control=RoleControlSettings(missing_s=0.05, cooldown_s=60.0))
SEEN = [SeenArrival(prompt_tokens=400, output_tokens=20, ttft_s=0.5, tpot_s=0.05)] * 8


class Mesh:
    """Two decode workers and none that prefills, as their snapshots and a gateway's beats tell."""

    def __init__(self) -> None:
        self.broker = MemoryHub().connect()
        self.store = MemoryStore(time.monotonic)
        self.changes: list[tuple[str, RoleChange]] = []
        self.decisions: list[Decision] = []
        self.workers = {name: self._snapshot(name, "decode") for name in ("d1", "d2")}
        self.arrived = 0

    def _snapshot(self, name: str, role: Role) -> WorkerSnapshot:
        return replace(
            MEASURED,
            worker=WorkerId(name),
            role=role,
            blocks_total=4096,
            max_num_seqs=64,
            max_model_len=8192,
            changing=False,
            role_decision=0,
        )

    async def listen(self) -> None:
        for name in self.workers:
            await self.broker.subscribe(NAMES.worker_inbox(WorkerId(name)), partial(self._on_inbox, name))
        await self.broker.subscribe(NAMES.decision("*"), lambda message: self.decisions.append(decode_decision(message.payload)))

    def _on_inbox(self, name: str, message: Message) -> None:
        change = decode_inbox(message.payload)
        assert isinstance(change, RoleChange)
        self.changes.append((name, change))
        self.workers[name] = replace(self.workers[name], role=change.role, role_decision=change.decision)

    async def tell(self, seconds: float) -> None:
        """Snapshots and loads for a while."""
        async with asyncio.timeout(seconds + 5.0):
            for number in range(round(seconds / LOOK_S)):
                for name, snapshot in self.workers.items():
                    told = replace(snapshot, sequence_number=number + 2)
                    self.broker.publish(NAMES.snapshot(WorkerId(name)), encode(Snapshot(snapshot=told)))
                self.arrived += len(SEEN)
                arrivals = ModelArrivals(model=MODEL, arrived=self.arrived, seen=SEEN)
                load = GatewayLoad(gateway="g", incarnation="i", models=[arrivals])
                self.broker.publish(NAMES.gateway_load(GatewayId("g")), encode(load))
                await asyncio.sleep(LOOK_S)

    def planner(self, name: str, mode: PlannerMode, log: io.BytesIO | None = None) -> PlannerService:
        return PlannerService(
            planner=name,
            mode=mode,
            interval_s=LOOK_S,
            broker=self.broker,
            store=self.store,
            names=NAMES,
            settings=SETTINGS,
            decision_log=log,
        )

    async def plan(self, *planners: PlannerService, seconds: float) -> None:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(planner.run(asyncio.Event())) for planner in planners]
            await self.tell(seconds)
            for task in running:
                task.cancel()
        for task in running:
            with suppress(asyncio.CancelledError):
                await task


async def test_one_of_two_planners_fills_the_empty_phase_once_and_its_log_replays() -> None:
    mesh, log = Mesh(), io.BytesIO()
    planners = mesh.planner("one", "on", log), mesh.planner("two", "on")
    await mesh.listen()
    await mesh.plan(*planners, seconds=0.6)
    (change,) = mesh.changes
    assert change == ("d1", RoleChange(role="prefill", decision=1))
    assert sum(planner.changes["prefill"] for planner in planners) == 1
    assert {d.planner for d in mesh.decisions if d.acting} == {"one"} or {d.planner for d in mesh.decisions if d.acting} == {"two"}
    replayed = list(replay(io.BytesIO(log.getvalue())))
    assert len(replayed) > 5
    assert all(each.same for each in replayed)


async def test_advice_is_published_and_sends_nothing() -> None:
    mesh = Mesh()
    await mesh.listen()
    await mesh.plan(mesh.planner("one", "advise"), seconds=0.4)
    assert mesh.changes == []
    advised = [d for d in mesh.decisions if d.role is not None]
    assert [(d.worker, d.role, d.acting) for d in advised] == [("d1", "prefill", False)]


async def test_the_lease_passes_on_where_a_planner_stops() -> None:
    mesh = Mesh()
    first = mesh.planner("one", "on")
    await mesh.plan(first, seconds=0.2)
    second = mesh.planner("two", "on")
    await mesh.plan(second, seconds=0.1)
    assert first.acting
    assert second.acting


async def test_a_changed_log_is_noticed() -> None:
    mesh, log = Mesh(), io.BytesIO()
    await mesh.plan(mesh.planner("one", "on", log), seconds=0.4)
    spoilt = log.getvalue().replace(b'"phase without a worker"', b'"gain"')
    assert not all(each.same for each in replay(io.BytesIO(spoilt)))
