"""The same answers through workers: two of them in this process, with real control connections, real steps and a real KV
transport between them. Each prompt is prefilled on one and decoded on the other, or runs on one worker alone.

Broker and store are the in-memory ones: they carry messages and hold no tokens back, and nothing need be installed.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.adapters.kv_transport import build_kv_transport
from common.adapters.memory_broker import MemoryHub
from common.adapters.memory_store import MemoryStore
from common.adapters.peer_network import TcpPeerNetwork
from common.engine.step_thread import StepThread
from common.mesh.intake import WorkerLimits
from common.mesh.sequence_engine import SequenceEngine
from common.mesh.worker import WorkerCore
from common.policy.batching import StepLimits
from common.policy.block_pool import BlockPool
from common.ports.broker import Message
from common.ports.kv_transport import KvRegion
from common.protocol.messages import ChoiceState, Dispatch, GatewayBeat, decode_dispatch_reply, decode_token_frame, encode, pack_ids
from common.protocol.subjects import Names
from common.protocol.token_stream import TokenStream
from common.runtime.incarnation import make_incarnation
from common.runtime.worker_parts import WorkerIdentity, WorkerWorld
from common.runtime.worker_service import WorkerService
from common.values.errors import SegueError
from common.values.ids import GatewayId, ReservationId, WorkerId
from common.values.kv_layout import Fingerprint, KvLayout
from common.values.model_card import ModelCard
from common.values.tokens import PositionLogprobs
from common.values.worker import Role
from tools.eval_engine_run import Continuation, greedy

if TYPE_CHECKING:
    from common.engine.watched_forward import WatchedModel

PREFILL, DECODE, GATEWAY, INCARNATION = WorkerId("prefill"), WorkerId("decode"), GatewayId("eval"), "1"
_WORKERS: tuple[tuple[WorkerId, Role], ...] = ((PREFILL, "prefill"), (DECODE, "decode"))
HOST = "127.0.0.1"
STEP_TOKENS = 256
READY_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 600.0
LOGPROBS = 5
BEAT_S = 1.0
PATIENCE_S = 300.0
"""An offer waits for room: every sequence is to be moved, however full the other worker is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshPlan:
    """What the two workers serve. `load` builds a model over a worker's region; it blocks."""

    card: ModelCard
    layout: KvLayout
    blocks: int
    sequences: int
    load: Callable[[KvRegion], "WatchedModel"]


@dataclass(slots=True)
class _Answer:
    stream: TokenStream
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


@asynccontextmanager
async def running_workers(plan: MeshPlan) -> AsyncIterator["EvalMesh"]:
    """Both workers, ready and paired. Raises SegueError where they cannot."""
    mesh = EvalMesh(plan)
    stop = asyncio.Event()
    async with AsyncExitStack() as closing, asyncio.TaskGroup() as tasks:
        ready = [await mesh.start(worker, role, tasks, closing, stop) for worker, role in _WORKERS]
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                for event in ready:
                    await event.wait()
            await mesh.listen()
            beating = tasks.create_task(mesh.beat(), name="beat")
            yield mesh
            beating.cancel()
        finally:
            stop.set()


class EvalMesh:
    """`answers` asks the workers as a gateway does, but says itself where a prompt is decoded."""

    def __init__(self, plan: MeshPlan) -> None:
        self._plan = plan
        self._names = Names("eval")
        self._hub = MemoryHub()
        self._store = MemoryStore(time.monotonic)
        self._key = secrets.token_bytes(32)
        self._broker = self._hub.connect()
        self._services: dict[WorkerId, WorkerService] = {}
        self._under_way: dict[str, _Answer] = {}
        self._asked = 0

    @property
    def moved(self) -> int:
        """How many sequences went from one worker to the other."""
        return self._services[PREFILL].core.desk.counters.settled["moved"]

    async def listen(self) -> None:
        if DECODE not in self._services[PREFILL].core.desk.post.peers:
            raise SegueError("the two workers cannot pair")
        await self._broker.subscribe(self._names.gateway_tokens(GATEWAY), self._on_frame)

    async def beat(self) -> None:
        """For as long as it asks, as gateways do: workers drop what a silent one had asked for."""
        while True:
            self._broker.publish(self._names.gateway_beat(GATEWAY), encode(GatewayBeat(gateway=GATEWAY, incarnation=INCARNATION)))
            await asyncio.sleep(BEAT_S)

    async def start(
        self, worker: WorkerId, role: Role, tasks: asyncio.TaskGroup, closing: AsyncExitStack, stop: asyncio.Event
    ) -> asyncio.Event:
        """Returns what is set once the worker is ready. What was opened last is closed first."""
        plan = self._plan
        transport = build_kv_transport(tiers=("tcp",), host=HOST)
        closing.push_async_callback(transport.close)
        region = await transport.start(plan.layout, plan.blocks)
        watched = await asyncio.to_thread(plan.load, region)
        step_engine = StepThread(watched.executor)
        closing.push_async_callback(step_engine.close)
        world = WorkerWorld(
            broker=self._hub.connect(),
            store=self._store,
            network=TcpPeerNetwork(self._key, HOST),
            transport=transport,
            region=region,
            step_engine=step_engine,
        )
        service = WorkerService(self._identity(worker, role), world, self._core(worker, region), self._names)
        self._services[worker] = service
        ready = asyncio.Event()
        tasks.create_task(service.run(stop, on_ready=ready.set), name=str(worker))
        return ready

    def _identity(self, worker: WorkerId, role: Role) -> WorkerIdentity:
        return WorkerIdentity(
            worker=worker,
            incarnation=make_incarnation(),
            role=role,
            card=self._plan.card,
            fingerprint=self._fingerprint,
            max_num_seqs=self._plan.sequences,
            drain_s=1.0,
        )

    def _core(self, worker: WorkerId, region: KvRegion) -> WorkerCore:
        """Without a prefix cache: nothing that was computed before helps."""
        card = self._plan.card
        engine = SequenceEngine(
            fingerprint=self._fingerprint,
            pool=BlockPool(region.blocks, region.generations, caching=False),
            limits=StepLimits(max_tokens=STEP_TOKENS, max_sequences=self._plan.sequences),
            max_model_len=card.max_model_len,
            eos_token_ids=card.eos_token_ids,
        )
        return WorkerCore(
            worker=worker,
            engine=engine,
            block_size=self._plan.layout.block_size,
            limits=WorkerLimits(max_model_len=card.max_model_len, vocab_size=card.vocab_size, offer_patience_s=PATIENCE_S),
            make_reservation=lambda: ReservationId(secrets.token_bytes(16)),
        )

    @property
    def _fingerprint(self) -> Fingerprint:
        return Fingerprint(weights=self._plan.card.model.revision, dtype=self._plan.layout.dtype, layout=self._plan.layout)

    # ------------------------------------------------------------------ asking

    async def answers(self, prompts: Sequence[Sequence[int]], *, new_tokens: int, moved: bool) -> list[Continuation]:
        """All prompts, as many at a time as a worker computes at once."""
        places = asyncio.Semaphore(self._plan.sequences)

        async def one(prompt: Sequence[int]) -> Continuation:
            async with places, asyncio.timeout(ANSWER_TIMEOUT_S):
                return await self._answer(prompt, new_tokens, moved=moved)

        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(one(prompt)) for prompt in prompts]
        return [task.result() for task in asked]

    async def _answer(self, prompt: Sequence[int], new_tokens: int, *, moved: bool) -> Continuation:
        self._asked += 1
        request_id = f"eval-{self._asked}"
        answer = self._under_way[request_id] = _Answer(TokenStream(choice=0, attempt=1))
        worker = PREFILL if moved else DECODE
        dispatch = Dispatch(
            request_id=request_id,
            attempt=1,
            gateway=GATEWAY,
            incarnation=INCARNATION,
            model=self._plan.card.model,
            prompt=pack_ids(prompt),
            choices=[ChoiceState(choice=0)],
            sampling=greedy(new_tokens, logprobs=LOGPROBS),
            decode_worker=DECODE if moved else None,
        )
        reply = await self._broker.request(self._names.worker_inbox(worker), encode(dispatch), timeout_s=READY_TIMEOUT_S)
        verdict = None if reply is None else decode_dispatch_reply(reply).verdict
        if verdict != "accepted":
            raise SegueError(f"worker {worker} answered {verdict} to a prompt of {len(prompt)} tokens")
        await answer.ended.wait()
        del self._under_way[request_id]
        return Continuation(tokens=tuple(answer.stream.tokens), bits=tuple(answer.logprobs))

    def _on_frame(self, message: Message) -> None:
        for entry in decode_token_frame(message.payload).entries:
            answer = self._under_way.get(entry.request_id)
            if answer is None:
                continue
            for fresh in answer.stream.accept(entry.attempt, entry.new):
                answer.logprobs += fresh.logprobs
            if answer.stream.ended:
                answer.ended.set()
