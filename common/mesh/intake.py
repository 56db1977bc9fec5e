"""What a worker takes: whether a dispatch, an offer, or the right to emit that comes with LAST adds up for this model and
this pool. Nothing here depends on what else runs."""

from collections.abc import Sequence
from dataclasses import dataclass

from common.mesh.sequence_engine import SequenceEngine
from common.protocol.messages import Dispatch, Last, Offer, RefuseReason
from common.values.errors import PeerError
from common.values.ids import ModelKey
from common.values.sampling import SamplingParameters


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """`offer_patience_s`: how long an offer may wait for room at a living peer before the sequence is decoded here. Where `model`
    is given, dispatches for another one are refused."""

    max_model_len: int
    vocab_size: int
    offer_patience_s: float = 2.0
    model: ModelKey | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error for the client, by its code; but `wrong_model` is for the gateway, whose picture of this worker is old."""

    code: str
    message: str


class Intake:
    """One per worker."""

    def __init__(self, limits: WorkerLimits, engine: SequenceEngine) -> None:
        self._limits = limits
        self._engine = engine

    def refusal(self, dispatch: Dispatch, prompt: tuple[int, ...]) -> Refusal | None:
        limits = self._limits
        if limits.model not in (None, dispatch.model):
            return Refusal("wrong_model", f"this worker does not serve {dispatch.model.name} {dispatch.model.revision}")
        if not prompt:
            return Refusal("invalid_request", "the prompt is empty")
        if len(prompt) >= limits.max_model_len:
            message = f"the prompt has {len(prompt)} tokens; this model takes at most {limits.max_model_len - 1}"
            return Refusal("context_length_exceeded", message)
        if not all(self._in_vocabulary(ids) for ids in (prompt, *(state.tokens for state in dispatch.choices))):
            return Refusal("invalid_request", f"token ids must be between 0 and {limits.vocab_size - 1}")
        if not self._engine.can_ever_fit(len(prompt), dispatch.sampling.max_tokens):
            message = "prompt and max_tokens do not fit the KV cache of a worker even when it is empty: ask for fewer tokens"
            return Refusal("kv_cache_too_small", message)
        return None

    def reason_to_refuse(self, offer: Offer, prompt: tuple[int, ...]) -> RefuseReason | None:
        whole = len(prompt) + len(offer.tokens)
        if not prompt or whole > self._limits.max_model_len or not 0 < offer.positions <= whole:
            return "mismatch"
        if not (self._in_vocabulary(prompt) and self._in_vocabulary(offer.tokens)):
            return "mismatch"
        return None if self._engine.can_ever_fit(len(prompt), offer.sampling.max_tokens) else "never_fits"

    def check_last(self, last: Last, prompt_tokens: int, given: tuple[int, ...], sampling: SamplingParameters) -> None:
        """What takes over the right to emit must continue what was offered. A peer that breaks this is not talked to."""
        new = last.new
        room = min(sampling.max_tokens, self._limits.max_model_len - prompt_tokens)
        continues = new.first == 0 and new.tokens[: len(given)] == given and len(given) < len(new.tokens) < room
        if not continues or new.ending is not None or not self._in_vocabulary(new.tokens):
            raise PeerError("LAST does not continue what was offered")

    def _in_vocabulary(self, ids: Sequence[int]) -> bool:
        return not ids or (min(ids) >= 0 and max(ids) < self._limits.vocab_size)
