"""The planner as a service: hears the mesh, asks the controller once a second, and sends what it decided.

One controller a model. A decision that needs the simulator computes in a thread of its own: hearing goes on meanwhile.
"""

import asyncio
import logging
import time
from collections import Counter
from typing import BinaryIO

from common.policy.role_control import RoleDecision
from common.policy.role_view import MeshView
from common.ports.broker import Broker, Message
from common.ports.state_store import StateStore
from common.protocol.messages import Decision, RoleChange, decode_gateway_load, decode_snapshot, encode
from common.protocol.subjects import Names
from common.runtime.message_refusals import MessageRefusals
from common.runtime.settings_planner import PlannerMode
from common.simulation.roles.decision_log import BeginLine, DecisionLine, encode_line
from common.simulation.roles.role_controller import ControllerSettings, RoleController
from common.values.errors import BrokerUnavailable, PeerError
from common.values.ids import ModelKey, WorkerId
from services.planner.acting_lease import ActingLease
from services.planner.mesh_watch import MeshWatch

logger = logging.getLogger(__name__)


class PlannerService:
    """`run` serves until it is cancelled. `counts` by reason; `changes` by role. `last` is the last decision of each model."""

    def __init__(
        self,
        *,
        planner: str,
        mode: PlannerMode,
        interval_s: float,
        broker: Broker,
        store: StateStore,
        names: Names,
        settings: ControllerSettings,
        decision_log: BinaryIO | None = None,
    ) -> None:
        self._planner = planner
        self._mode = mode
        self._interval_s = interval_s
        self._broker = broker
        self._names = names
        self._settings = settings
        self._log = decision_log
        self._lease = ActingLease(store, names.planner_key, planner)
        self._controllers: dict[ModelKey, RoleController] = {}
        self.watch = MeshWatch()
        self.acting = False
        self.counts: Counter[str] = Counter()
        self.changes: Counter[str] = Counter()
        self.last: dict[ModelKey, RoleDecision] = {}
        self.decide_s = 0.0
        self.refusals = MessageRefusals()

    @property
    def ready(self) -> bool:
        return self._broker.connected

    async def run(self, started: asyncio.Event) -> None:
        subscriptions = [
            await self._broker.subscribe(self._names.all_snapshots, self._on_snapshot),
            await self._broker.subscribe(self._names.all_gateway_loads, self._on_load),
        ]
        started.set()
        try:
            while True:
                await asyncio.sleep(self._interval_s)
                await self._look()
        finally:
            for subscription in subscriptions:
                await subscription.close()
            if self.acting:
                await self._lease.release()

    async def _look(self) -> None:
        now = time.monotonic()
        if not self._broker.connected:
            self.watch.refresh(now)
            return
        self.watch.on_tick(now)
        self.acting = self._mode == "on" and await self._lease.hold()
        for model, view in self.watch.views(now).items():
            began = time.monotonic()
            decision = await asyncio.to_thread(self._controller(model).decide, view)
            self.decide_s = time.monotonic() - began
            self._perform(model, view, decision)

    def _controller(self, model: ModelKey) -> RoleController:
        if model not in self._controllers:
            self._controllers[model] = RoleController(self._settings)
            self._write(BeginLine(model=_shown(model), settings=self._settings))
        return self._controllers[model]

    def _perform(self, model: ModelKey, view: MeshView, decision: RoleDecision) -> None:
        self.counts[decision.reason] += 1
        self.last[model] = decision
        change, acted = 0, False
        if decision.move is not None and self.acting:
            change = self.watch.next_change()
            acted = self._send(WorkerId(decision.move.worker), RoleChange(role=decision.move.role, decision=change))
        if acted and decision.move is not None:
            self.watch.changed(WorkerId(decision.move.worker), change, time.monotonic())
            self.changes[decision.move.role] += 1
        if decision.move is not None:
            fields = {"worker": decision.move.worker, "role": decision.move.role, "reason": decision.reason, "change": change}
            logger.info("role_change_sent" if acted else "role_advice", extra={"fields": fields})
        self._publish(model, decision, acted=acted, change=change)
        self._write(DecisionLine(model=_shown(model), wall_time=time.time(), acted=acted, view=view, decision=decision))

    def _send(self, worker: WorkerId, change: RoleChange) -> bool:
        try:
            self._broker.publish(self._names.worker_inbox(worker), encode(change))
        except BrokerUnavailable as error:
            logger.warning("role_change_lost", extra={"fields": {"worker": worker, "reason": str(error)}})
            return False
        return True

    def _publish(self, model: ModelKey, decision: RoleDecision, *, acted: bool, change: int) -> None:
        pressure = decision.pressure
        message = Decision(
            planner=self._planner,
            number=decision.number,
            model=model,
            acting=acted,
            reason=decision.reason,
            worker=None if decision.move is None else decision.move.worker,
            role=None if decision.move is None else decision.move.role,
            change=change,
            rate=decision.rate,
            pressure_prefill=0.0 if pressure is None else pressure.prefill,
            pressure_decode=0.0 if pressure is None else pressure.decode,
            gain=decision.trials[0].gain if decision.trials else None,
        )
        try:
            self._broker.publish(self._names.decision(self._planner), encode(message))
        except BrokerUnavailable as error:
            logger.warning("decision_lost", extra={"fields": {"reason": str(error)}})

    def _write(self, line: BeginLine | DecisionLine) -> None:
        if self._log is not None:
            self._log.write(encode_line(line))
            self._log.flush()

    def _on_snapshot(self, message: Message) -> None:
        try:
            self.watch.on_snapshot(decode_snapshot(message.payload), time.monotonic())
        except PeerError as error:
            self.refusals.note("snapshot", error)

    def _on_load(self, message: Message) -> None:
        try:
            self.watch.on_load(decode_gateway_load(message.payload), time.monotonic())
        except PeerError as error:
            self.refusals.note("load", error)


def _shown(model: ModelKey) -> str:
    return f"{model.name}@{model.revision}"
