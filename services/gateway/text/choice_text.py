"""One choice of a request as text: tokens in, text events out.

An event is a pure function of the request and the choice's token log: at most one per token, made by the token that yields
text or ends the choice, whatever batches the tokens came in. Tokens past a stop string are not counted.
"""

from dataclasses import dataclass
from typing import Literal

import msgspec

from common.ports.generation import TokenEvent
from common.values.errors import RequestFailed
from common.values.tokens import Ending, PositionLogprobs
from services.gateway.text.detokenizer import Detokenizer
from services.gateway.text.stop_matcher import StopMatcher

TextFinish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRecord:
    """A counted token whose log-probabilities were asked for. `text_offset` is where its text starts, in characters."""

    token: int
    logprobs: PositionLogprobs
    text_offset: int


class TextEvent(msgspec.Struct, frozen=True, kw_only=True):
    """`consumed` counts the choice's tokens up to here. `records` are those since the event before. `is_lone`: an end without
    a token of its own, so the event before may have the same count."""

    choice: int
    text: str
    consumed: int
    records: tuple[TokenRecord, ...] = ()
    finish: TextFinish | None = None
    is_lone: bool = False


class ChoiceText:
    """Detokeniser and stop matcher of one choice. Stop strings count from token `min_tokens` on."""

    def __init__(self, *, choice: int, detokenizer: Detokenizer, stops: StopMatcher, min_tokens: int = 0) -> None:
        self._choice = choice
        self._detokenizer = detokenizer
        self._stops = stops
        self._min_tokens = min_tokens
        self._characters = 0
        self._records: list[TokenRecord] = []
        self.consumed = 0
        self.finish: TextFinish | None = None

    @property
    def stopped_early(self) -> bool:
        """A stop string was matched: the mesh may still be making tokens that nobody wants."""
        return self._stops.matched

    def feed(self, event: TokenEvent) -> TextEvent | None:
        """Raises RequestFailed where the choice ended with an error."""
        if self.finish is not None:
            return None
        ending = event.ending
        piece = "" if event.token is None else self._decoded(event.token, event.logprobs, ending)
        if ending is not None:
            if ending.reason == "error":
                raise RequestFailed(ending.error_message or "the generation failed", code=ending.error_code or "internal_error")
            piece += self._detokenizer.flush()
        text = self._stops.feed(piece) if self.consumed > self._min_tokens else piece
        if self._stops.matched:
            self.finish = "stop"
        elif ending is not None:
            text += self._stops.flush()
            self.finish = "stop" if ending.reason == "stop" else "length"
        if not text and self.finish is None:
            return None
        records, self._records = tuple(self._records), []
        return TextEvent(
            choice=self._choice,
            text=text,
            consumed=self.consumed,
            records=records,
            finish=self.finish,
            is_lone=event.token is None,
        )

    def _decoded(self, token: int, logprobs: PositionLogprobs | None, ending: Ending | None) -> str:
        """Count a token and decode it; a stop token is counted and yields no text."""
        self.consumed += 1
        if logprobs is not None:
            self._records.append(TokenRecord(token=token, logprobs=logprobs, text_offset=self._characters))
        if ending is not None and ending.reason == "stop" and ending.stop_token in (None, token):
            return ""
        text = self._detokenizer.step(token)
        self._characters += len(text)
        return text
