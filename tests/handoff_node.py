"""One worker core with its shadow engine, and the outside that its effects reach; and the connection between two of them."""

from collections import deque
from dataclasses import dataclass, field
from random import Random

from common.mesh.intake import WorkerLimits
from common.mesh.sequence_engine import SequenceEngine
from common.mesh.worker import WorkerCore
from common.mesh.worker_effects import AnnounceSuspect, PullBlocks, SealBlocks
from common.policy.batching import StepLimits
from common.policy.block_pool import BlockPool
from common.protocol.messages import Cancel, Dispatch
from common.simulation.shadow_kv import EOS, VOCABULARY, ShadowKv, ShadowStep
from common.values.ids import Incarnation, ModelKey, ReservationId, SequenceKey, WorkerId
from common.values.kv_layout import Fingerprint, KvLayout
from common.values.worker import WorkerSnapshot, WorkerState

BLOCK = 4
MAX_MODEL_LEN = 36
FINGERPRINT = Fingerprint(weights="w", dtype="float32", layout=KvLayout(layers=1, kv_heads=1, head_dim=1, block_size=BLOCK))


class Node:
    """One worker and the outside that its effects reach."""

    def __init__(self, name: str, random: Random, blocks: int, *, budget: int, sequences: int, waiting: int) -> None:
        self.worker = WorkerId(name)
        self.kv = ShadowKv(blocks, BLOCK)
        self.step = ShadowStep(self.kv)
        self.pool = BlockPool(blocks, self.kv.generations)
        self.engine = SequenceEngine(
            fingerprint=FINGERPRINT,
            pool=self.pool,
            limits=StepLimits(max_tokens=budget, max_sequences=sequences),
            max_model_len=MAX_MODEL_LEN,
            eos_token_ids=EOS,
            max_waiting=waiting,
        )
        self.core = WorkerCore(
            worker=self.worker,
            engine=self.engine,
            block_size=BLOCK,
            limits=WorkerLimits(max_model_len=MAX_MODEL_LEN, vocab_size=VOCABULARY, offer_patience_s=2.0, model=ModelKey("m", "1")),
            make_reservation=lambda: ReservationId(random.randbytes(16)),
        )
        self.numbers = 0
        self.seals: list[SealBlocks] = []
        self.pulls: list[tuple[PullBlocks, dict[int, int]]] = []
        self.announcements: deque[AnnounceSuspect] = deque()
        self.grants: dict[bytes, dict[int, int]] = {}
        self.inbox: deque[Dispatch | Cancel] = deque()
        self.cancelled: dict[SequenceKey, int] = {}

    def snapshot(self, state: WorkerState, load: float = 0.0) -> WorkerSnapshot:
        """What the others hear of it; `load` makes it look more or less busy."""
        self.numbers += 1
        return WorkerSnapshot(
            worker=self.worker,
            incarnation=Incarnation("1"),
            model=ModelKey("m", "1"),
            role="both",
            state=state,
            sequence_number=self.numbers,
            control_host="",
            control_port=0,
            fingerprint=FINGERPRINT,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=4,
            blocks_total=10,
            blocks_free=10,
            blocks_cached=0,
            seconds_per_step=load,
        )


@dataclass(slots=True)
class Link:
    """A control connection. Once `broken`, what is under way may still arrive; then each side notices the loss."""

    channels: dict[WorkerId, deque[bytes]] = field(default_factory=dict)
    joined: set[WorkerId] = field(default_factory=set)
    broken: bool = False
