"""How large a simulated worker is: small, so that pools fill up, queues overflow and sequences are preempted."""

from dataclasses import dataclass
from random import Random

from common.protocol.subjects import Names
from common.values.ids import ModelKey
from common.values.kv_layout import Fingerprint, KvLayout
from common.values.worker import Role

BLOCK = 4
MODEL = ModelKey("m", "1")
NAMES = Names("simulated")
FINGERPRINT = Fingerprint(weights="w", dtype="float32", layout=KvLayout(layers=1, kv_heads=1, head_dim=1, block_size=BLOCK))


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """Of sequences in one world: mostly short ones; long ones that decode slowly show work that nobody wants any more."""

    max_model_len: int
    most_new_tokens: int

    @property
    def blocks(self) -> int:
        """Of a pool that fits every sequence."""
        return -(-self.max_model_len // BLOCK)


SHORT = Length(max_model_len=36, most_new_tokens=12)
LONG = Length(max_model_len=144, most_new_tokens=120)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerShape:
    """`max_model_len` of sequences, `blocks` of the pool, token `budget` of a step, `sequences` at a time, places in the queue."""

    role: Role
    max_model_len: int
    blocks: int
    budget: int
    sequences: int
    waiting: int


def draw_shapes(random: Random, workers: int, length: Length) -> list[WorkerShape]:
    """Mostly one prefill worker and decode workers; any other mix now and then, also one without decode workers. A pool that
    does not fit every request is rare."""
    usual: list[Role] = ["prefill", *["decode"] * (workers - 1)]  # type: ignore[list-item]
    if random.random() < 0.4:
        usual = [random.choice(("prefill", "decode", "both")) for _ in range(workers)]
    least = length.blocks if random.random() < 0.9 else length.blocks // 2
    return [
        WorkerShape(
            role=role,
            max_model_len=length.max_model_len,
            blocks=least + random.randint(0, random.choice([3, 11, 31])),
            budget=random.randint(3, 24),
            sequences=random.randint(2, 6),
            waiting=random.choice([2, 8, 64]),
        )
        for role in usual
    ]
