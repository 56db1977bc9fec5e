"""What a worker tells the mesh about itself, over and over."""

from dataclasses import dataclass, field
from typing import Literal

from common.values.ids import Incarnation, ModelKey, WorkerId
from common.values.kv_layout import Fingerprint
from common.values.step_coefficients import StepCoefficients

Role = Literal["prefill", "decode", "both"]
WorkerState = Literal["loading", "ready", "draining"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSnapshot:
    """A worker's state at one moment of its own clock; the reader adds `observed_at` of its own.

    Token counts are of tokens still to compute; blocks are of the KV pool. `cached_blocks` are free for the asking.
    `seconds_per_prefill_token` and `seconds_per_step` are moving averages of what was measured (0.0 before the first step).
    `peers` names the workers that it can hand off to or take over from, with the tier; `unpaired` says why for those it
    cannot ("layout", "weights", …).

    `step_time` is None before it is known. `prefill_queue_s`: predicted seconds of the prompts that wait or are being computed
    here. `decoding` sequences decode and read `decoding_kv_tokens` a step; `stream_slack_s` is what the tightest of them can lose
    until it misses its objective (None: none runs), `tokens_left` the mean of what they are expected to make yet. A hand-off
    from here takes `transfer_base_s` and `transfer_per_token_s` beyond what prefill hides. `reserved_tokens_free`: KV room in
    tokens that is promised to nobody. While it is `changing`, what belongs to its former role still ends or moves;
    `role_decision` is the number of the role change that it took last.
    """

    worker: WorkerId
    incarnation: Incarnation
    model: ModelKey
    role: Role
    state: WorkerState
    sequence_number: int
    control_host: str
    control_port: int
    fingerprint: Fingerprint
    max_model_len: int
    max_num_seqs: int
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    waiting: int = 0
    running: int = 0
    queued_tokens: int = 0
    seconds_per_prefill_token: float = 0.0
    seconds_per_step: float = 0.0
    peers: dict[str, str] = field(default_factory=dict)
    unpaired: dict[str, str] = field(default_factory=dict)
    process_id: int = 0
    step_time: StepCoefficients | None = None
    prefill_queue_s: float = 0.0
    decoding: int = 0
    decoding_kv_tokens: int = 0
    stream_slack_s: float | None = None
    tokens_left: float = 0.0
    transfer_base_s: float = 0.0
    transfer_per_token_s: float = 0.0
    reserved_tokens_free: int | None = None
    changing: bool = False
    role_decision: int = 0
