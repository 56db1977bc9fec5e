"""One worker core with its shadow engine, and the outside that its effects reach; and the connection between two of them."""

from collections import deque
from dataclasses import dataclass, field
from random import Random

from common.mesh.sequence_engine import SequenceEngine
from common.mesh.worker import WorkerCore, WorkerLimits
from common.mesh.worker_effects import AnnounceSuspect, PullBlocks, SealBlocks
from common.policy.batching import StepLimits
from common.policy.block_pool import BlockPool
from common.protocol.messages import Cancel, Dispatch
from common.simulation.shadow_kv import EOS, VOCABULARY, ShadowKv, ShadowStep
from common.values.ids import ReservationId, SequenceKey, WorkerId
from common.values.kv_layout import Fingerprint, KvLayout

BLOCK = 4
MAX_MODEL_LEN = 36


class Node:
    """One worker and the outside that its effects reach."""

    def __init__(self, name: str, random: Random, blocks: int, *, budget: int, sequences: int, waiting: int) -> None:
        self.worker = WorkerId(name)
        self.kv = ShadowKv(blocks, BLOCK)
        self.step = ShadowStep(self.kv)
        self.pool = BlockPool(blocks, self.kv.generations)
        self.engine = SequenceEngine(
            fingerprint=Fingerprint(weights="w", dtype="float32", layout=KvLayout(layers=1, kv_heads=1, head_dim=1, block_size=BLOCK)),
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
            limits=WorkerLimits(max_model_len=MAX_MODEL_LEN, vocab_size=VOCABULARY, offer_patience_s=2.0),
            make_reservation=lambda: ReservationId(random.randbytes(16)),
        )
        self.seals: list[SealBlocks] = []
        self.pulls: list[tuple[PullBlocks, dict[int, int]]] = []
        self.announcements: deque[AnnounceSuspect] = deque()
        self.grants: dict[bytes, dict[int, int]] = {}
        self.inbox: deque[Dispatch | Cancel] = deque()
        self.cancelled: dict[SequenceKey, int] = {}


@dataclass(slots=True)
class Link:
    """A control connection. Once `broken`, what is under way may still arrive; then each side notices the loss."""

    channels: dict[WorkerId, deque[bytes]] = field(default_factory=dict)
    joined: set[WorkerId] = field(default_factory=set)
    broken: bool = False
