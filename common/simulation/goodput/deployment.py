"""What is simulated: how many workers in which roles, how fast they are, and which policies they run."""

from dataclasses import dataclass, field

from common.policy.admission import LatePolicy
from common.policy.placement import PlacementRule
from common.policy.prefill_queue import BatchLimits, PrefillOrder
from common.policy.step_time import StepTime

UNBOUNDED = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferTime:
    """What of a hand-off is not hidden behind the prefill."""

    base_s: float = 0.0
    per_token_s: float = 0.0

    def seconds(self, tokens: int) -> float:
        return self.base_s + self.per_token_s * tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Policies:
    """`chunk_tokens`: longer prompts are computed in chunks on prefill workers, and an urgent one may go between; None: whole.
    `free`: a prompt may be prefilled on a decode worker, and a request may stay where it was prefilled. `late`: what admission
    does with a request that cannot be good; None: no admission, everything is taken. `share_allowance`: weighted tokens that a key
    may have had lately before it gives way to others of its class; None: keys are not told apart."""

    order: PrefillOrder = "feasible_first"
    prefill_rule: PlacementRule = "least_seconds"
    decode_rule: PlacementRule = "least_seconds"
    chunk_tokens: int | None = None
    free: bool = False
    late: LatePolicy | None = None
    share_allowance: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """`kv_tokens` and `max_sequences` of each worker. `step_tokens`: positions in one step of a worker that mixes prompt chunks
    and decode rows. `first_token_counts`: the prefill makes the first of the output tokens (else, as in DistServe's simulator,
    all of them are decode steps). `step_by_step`: the slow reference that takes every decode step by itself. `changeable`: workers may
    change their roles; each then has what both need."""

    prefill: int
    decode: int
    both: int = 0
    step_time: StepTime
    kv_tokens: int = UNBOUNDED
    max_sequences: int = UNBOUNDED
    batch: BatchLimits = field(default_factory=lambda: BatchLimits(max_tokens=2048))
    step_tokens: int = 256
    transfer: TransferTime = field(default_factory=TransferTime)
    policies: Policies = field(default_factory=Policies)
    prefix_block_tokens: int = 512
    prefix_blocks: int = 0
    first_token_counts: bool = True
    step_by_step: bool = False
    changeable: bool = False

    def __post_init__(self) -> None:
        if min(self.prefill, self.decode, self.both) < 0 or (self.prefill == 0) != (self.decode == 0):
            raise ValueError("prefill and decode workers come together")
        if self.prefill + self.both < 1:
            raise ValueError("there is at least one worker")
        if self.kv_tokens < 1 or self.max_sequences < 1 or self.step_tokens < 1:
            raise ValueError("limits are at least 1")

    @property
    def workers(self) -> int:
        return self.prefill + self.decode + self.both

    @property
    def name(self) -> str:
        split = f"{self.prefill}:{self.decode}" if self.prefill else ""
        mixed = f"{self.both} colocated" if self.both else ""
        return " + ".join(part for part in (split, mixed) if part) + (" free" if self.policies.free else "")
