"""What the planner knows of the mesh when it decides on roles: workers as their snapshots tell, and the requests that came lately.

A view is all that a decision depends on, so that a log of views replays to the same decisions.
"""

from dataclasses import dataclass

from common.policy.step_time import StepTime
from common.values.worker import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """`prefill_queue_s`: predicted seconds of prompts that wait and run there. `decoding` sequences read `decoding_kv_tokens` a
    step and will make `tokens_left` more each, on average. `kv_tokens`: of the whole pool. `changing`: it still runs what its last
    role left."""

    worker: str
    role: Role
    changing: bool = False
    prefill_queue_s: float = 0.0
    decoding: int = 0
    decoding_kv_tokens: int = 0
    tokens_left: float = 0.0
    kv_tokens: int
    max_sequences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenRequest:
    """A request that came: `output_tokens` as predicted then, its objectives in seconds."""

    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    tpot_s: float

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1 or self.ttft_s <= 0.0 or self.tpot_s <= 0.0:
            raise ValueError("a request has tokens and positive objectives")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshView:
    """`seconds` since the view before, in which `arrived` requests came; `seen` are some of them (all, where they are few).
    Of one model, at `now` on the observer's clock. `free`: the gateways place freely."""

    now: float
    seconds: float
    arrived: int
    seen: tuple[SeenRequest, ...]
    workers: tuple[WorkerView, ...]
    step_time: StepTime
    transfer_base_s: float = 0.0
    transfer_per_token_s: float = 0.0
    free: bool = False

    @property
    def prefill(self) -> tuple[WorkerView, ...]:
        return tuple(worker for worker in self.workers if worker.role == "prefill")

    @property
    def decode(self) -> tuple[WorkerView, ...]:
        return tuple(worker for worker in self.workers if worker.role == "decode")

    @property
    def both(self) -> tuple[WorkerView, ...]:
        return tuple(worker for worker in self.workers if worker.role == "both")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleMove:
    worker: str
    role: Role
