"""A whole mesh in one process: real cores and shells over in-memory adapters, with the synthetic engine.

The synthetic engine writes a pattern of its tokens into the KV region and checks it before each step, so a hand-off that
moved wrong bytes, or a block shared with the wrong prompt, shows as a fault.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from common.adapters.memory_broker import MemoryBroker, MemoryHub
from common.adapters.memory_peers import MemoryPeerHub, MemoryPeerNetwork
from common.adapters.memory_store import MemoryStore
from common.adapters.memory_transport import MemoryTransport, MemoryTransportHub
from common.engine.step_thread import StepThread
from common.engine.synthetic import StepTimes, SyntheticExecutor
from common.mesh.intake import WorkerLimits
from common.mesh.sequence_engine import SequenceEngine
from common.mesh.worker import WorkerCore
from common.policy.batching import StepLimits
from common.policy.block_pool import BlockPool
from common.ports.broker import Broker
from common.ports.generation import GenerationRequest, TokenEvent
from common.protocol.subjects import Names
from common.protocol.wire_version import WIRE_VERSION
from common.runtime.incarnation import make_incarnation
from common.runtime.worker_parts import WorkerIdentity, WorkerWorld
from common.runtime.worker_service import WorkerService
from common.values.ids import GatewayId, ModelKey, RequestId, ReservationId, WorkerId
from common.values.kv_layout import Fingerprint, KvLayout
from common.values.model_card import ModelCard
from common.values.sampling import SamplingParameters
from common.values.worker import Role
from services.gateway.mesh_client import LiveMesh
from tests.other_release import OtherReleaseBroker, OtherReleasePeers

VOCAB = 1000
EOS = 2
LAYOUT = KvLayout(layers=2, kv_heads=1, head_dim=4, block_size=4)


def card(name: str = "tiny", *, max_model_len: int = 256) -> ModelCard:
    return ModelCard(
        model=ModelKey(name, f"revision-of-{name}"),
        max_model_len=max_model_len,
        vocab_size=VOCAB,
        tokenizer=b"{}",
        eos_token_ids=(EOS,),
    )


@dataclass
class MeshInMemory:
    """`start_worker` and `stop_worker` may be called while requests run."""

    tasks: asyncio.TaskGroup
    broker: MemoryHub = field(default_factory=MemoryHub)
    peers: MemoryPeerHub = field(default_factory=MemoryPeerHub)
    transports: MemoryTransportHub = field(default_factory=MemoryTransportHub)
    store: MemoryStore = field(default_factory=lambda: MemoryStore(time.monotonic))
    names: Names = field(default_factory=lambda: Names("test"))
    workers: dict[str, "RunningWorker"] = field(default_factory=dict)
    gateways: list[tuple[LiveMesh, asyncio.Task[None]]] = field(default_factory=list)
    gateway_brokers: dict[str, MemoryBroker] = field(default_factory=dict)

    async def start_gateway(self, name: str = "g0", *, version: int = WIRE_VERSION) -> LiveMesh:
        """Of another `version` all that it says is, and has fields of its own."""
        self.gateway_brokers[name] = own = self.broker.connect()
        broker: Broker = own if version == WIRE_VERSION else OtherReleaseBroker(own, version)
        mesh = LiveMesh(
            gateway=GatewayId(name),
            incarnation=make_incarnation(),
            broker=broker,
            store=self.store,
            names=self.names,
        )
        started = asyncio.Event()
        self.gateways.append((mesh, self.tasks.create_task(mesh.run(started))))
        await started.wait()
        return mesh

    async def start_worker(
        self,
        name: str,
        role: Role,
        *,
        blocks: int = 128,
        max_num_seqs: int = 16,
        max_tokens: int = 32,
        times: StepTimes | None = None,
        model: ModelCard | None = None,
        version: int = WIRE_VERSION,
    ) -> "RunningWorker":
        worker = RunningWorker(self, name, role, model or card(), version)
        self.workers[name] = worker
        await worker.start(blocks=blocks, max_num_seqs=max_num_seqs, max_tokens=max_tokens, times=times)
        return worker

    async def close(self) -> None:
        for worker in list(self.workers.values()):
            await worker.stop()
        for _, task in self.gateways:
            task.cancel()

    async def settled(self, gateway: LiveMesh) -> None:
        """Wait until every worker is ready, the gateway has its card, and prefill workers are seen to be paired."""
        for worker in self.workers.values():
            await worker.ready.wait()
        decodes = {name for name, worker in self.workers.items() if worker.role == "decode"}
        async with asyncio.timeout(10):
            while True:
                seen = {str(s.worker): s for s in gateway.core.registry.all() if s.state == "ready"}
                paired = all(decodes <= set(s.peers) for s in seen.values() if s.role == "prefill")
                if set(self.workers) <= set(seen) and paired and gateway.cards():
                    return
                await asyncio.sleep(0.02)

    async def quiet(self) -> None:
        """Wait until no worker holds anything, then check that every block is free or cached."""
        async with asyncio.timeout(20):
            while not all(worker.service.core.idle for worker in self.workers.values()):
                await asyncio.sleep(0.02)
        for worker in self.workers.values():
            worker.service.core.check_invariants()
            load = worker.service.core.load()
            assert load.blocks_free + load.blocks_cached == load.blocks_total


class RunningWorker:
    """One worker of the mesh, with its shell."""

    def __init__(self, mesh: MeshInMemory, name: str, role: Role, model: ModelCard, version: int) -> None:
        self.mesh = mesh
        self.name = name
        self.role = role
        self.card = model
        self.version = version
        self.stopping = asyncio.Event()
        self.ready = asyncio.Event()
        self.task: asyncio.Task[None]
        self.service: WorkerService

    async def start(self, *, blocks: int, max_num_seqs: int, max_tokens: int, times: StepTimes | None) -> None:
        transport = MemoryTransport(self.mesh.transports)
        region = await transport.start(LAYOUT, blocks)
        fingerprint = Fingerprint(weights=self.card.model.revision, dtype="float32", layout=LAYOUT)
        engine = SequenceEngine(
            fingerprint=fingerprint,
            pool=BlockPool(blocks, region.generations),
            limits=StepLimits(max_tokens=max_tokens, max_sequences=max_num_seqs),
            max_model_len=self.card.max_model_len,
            eos_token_ids=self.card.eos_token_ids,
        )
        core = WorkerCore(
            worker=WorkerId(self.name),
            engine=engine,
            block_size=LAYOUT.block_size,
            limits=WorkerLimits(
                max_model_len=self.card.max_model_len, vocab_size=self.card.vocab_size, offer_patience_s=0.5, model=self.card.model
            ),
            make_reservation=lambda: ReservationId(secrets.token_bytes(16)),
            role=self.role,
        )
        identity = WorkerIdentity(
            worker=WorkerId(self.name),
            incarnation=make_incarnation(),
            role=self.role,
            card=self.card,
            fingerprint=fingerprint,
            max_num_seqs=max_num_seqs,
            drain_s=5.0,
        )
        self.transport = transport
        self.network = MemoryPeerNetwork(self.mesh.peers)
        self.broker = self.mesh.broker.connect()
        self.step_engine = step_engine = StepThread(SyntheticExecutor(vocab_size=self.card.vocab_size, region=region, times=times))
        world = WorkerWorld(
            broker=self.broker if self.version == WIRE_VERSION else OtherReleaseBroker(self.broker, self.version),
            store=self.mesh.store,
            network=self.network if self.version == WIRE_VERSION else OtherReleasePeers(self.network, self.version),
            transport=transport,
            region=region,
            step_engine=step_engine,
        )
        self.service = WorkerService(identity, world, core, self.mesh.names)

        async def run() -> None:
            await self.service.run(self.stopping, on_ready=self.ready.set)
            await step_engine.close()
            await transport.close()
            await world.broker.close()

        self.task = self.mesh.tasks.create_task(run(), name=self.name)

    async def crash(self) -> None:
        """Gone at once: no farewell, no draining, connections cut, the broker not told."""
        self.broker.disconnect()
        self.task.cancel()
        await asyncio.wait([self.task])
        self.mesh.workers.pop(self.name, None)
        await self.network.close()
        await self.step_engine.close()
        await self.transport.close()

    async def stop(self) -> None:
        self.stopping.set()
        await self.task
        self.mesh.workers.pop(self.name, None)


@asynccontextmanager
async def running_mesh(*, max_payload_bytes: int = 1 << 20) -> AsyncIterator[MeshInMemory]:
    async with asyncio.TaskGroup() as tasks:
        mesh = MeshInMemory(tasks, broker=MemoryHub(max_payload_bytes=max_payload_bytes))
        try:
            yield mesh
        finally:
            await mesh.close()


def request(
    prompt: Sequence[int], *, max_tokens: int = 8, choices: int = 1, model: str = "tiny", **sampling: object
) -> GenerationRequest:
    return GenerationRequest(
        request_id=RequestId(secrets.token_hex(8)),
        model=model,
        prompt=tuple(prompt),
        sampling=SamplingParameters(max_tokens=max_tokens, seed=1, **sampling),  # type: ignore[arg-type]
        choices=choices,
    )


async def collect(mesh: LiveMesh, wanted: GenerationRequest) -> dict[int, list[TokenEvent]]:
    """All events of a request, by choice, checked to be gapless."""
    events: dict[int, list[TokenEvent]] = {choice: [] for choice in range(wanted.choices)}
    generation = await mesh.start(wanted)
    try:
        while batch := await generation.next_events():
            for event in batch:
                assert event.index == len([e for e in events[event.choice] if e.token is not None])
                events[event.choice].append(event)
    finally:
        await generation.close()
    return events


def tokens(events: Sequence[TokenEvent]) -> list[int]:
    return [event.token for event in events if event.token is not None]
