"""How the next token of a sequence is drawn."""

from dataclasses import dataclass, field

from common.values.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParameters:
    """Validated where it is made; the same object travels from the gateway to every worker.

    Stop *strings* are not here: the gateway matches them on text. `seed` is drawn by the gateway where the client gave
    none, so that a retry draws the same tokens: a draw is a function of (seed, choice, position) alone.
    `logprobs` is the number of alternatives per token (0: the chosen token only; None: none at all).
    `max_tokens` counts new tokens; the gateway fills it in from the context length where the client gave none.
    """

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens >= 1, "at least 1")
        _check("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "between 0 and max_tokens")
        _check("seed", 0 <= self.seed < 2**63, "between 0 and 2**63 - 1")
        _check("temperature", 0.0 <= self.temperature <= 100.0, "between 0 and 100")
        _check("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1")
        _check("top_k", self.top_k >= 0, "0 (all) or more")
        _check("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1")
        _check("repetition_penalty", 0.0 < self.repetition_penalty <= 100.0, "above 0 and at most 100")
        _check("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "between -2 and 2")
        _check("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "between -2 and 2")
        _check("stop_token_ids", len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS, f"at most {MAX_STOP_TOKEN_IDS} ids")
        _check("logit_bias", all(-100.0 <= b <= 100.0 for b in self.logit_bias.values()), "values between -100 and 100")
        for name, value in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            _check(name, value is None or 0 <= value <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def _check(name: str, holds: bool, takes: str) -> None:
    if not holds:
        raise InvalidRequest(f"{name} must be {takes}", param=name)
