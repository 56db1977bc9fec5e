"""Stop strings, matched on text that comes in pieces.

The text is cut at the stop string that *ends* first (the longest one where several end there), because that rule alone
gives the same text however it was cut into tokens. A suffix that could still become a stop string is held back.
"""

from collections.abc import Sequence

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024


class StopMatcher:
    """`feed` pieces until `matched`; `flush` gives what is held once the sequence has ended otherwise."""

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._include = include_stop
        self._prefixes = frozenset(stop[:length] for stop in stops for length in range(1, len(stop)))
        self._longest = max((len(stop) for stop in stops), default=0)
        self._held = ""
        self.matched = False

    def feed(self, piece: str) -> str:
        """The text that is safe to show now. Pieces after a match yield nothing."""
        if self.matched or not piece:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        if (cut := self._cut(text)) is not None:
            self.matched = True
            self._held = ""
            return text[:cut]
        hold = self._held_length(text)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _cut(self, text: str) -> int | None:
        """Where the shown text ends: before (or after, with `include_stop`) the stop string that ends first."""
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if not found:
            return None
        end, start = min(found)
        return end if self._include else start

    def _held_length(self, text: str) -> int:
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if text[-length:] in self._prefixes:
                return length
        return 0
