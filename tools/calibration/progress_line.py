"""The line that shows on a terminal how far a calibration is."""

import sys
import time
from typing import TextIO

WIDTH = 30
INTERVAL_S = 0.1


def progress_line(what: str, done: float, whole: float, unit: str) -> str:
    cells = int(WIDTH * min(1.0, done / whole)) if whole > 0.0 else WIDTH
    return f"calibrate {'█' * cells}{'·' * (WIDTH - cells)} {done:.0f} of {whole:.0f} {unit}, {what}"


class ProgressLine:
    """Draws on a terminal only, at most ten times a second; elsewhere it says nothing but what it is told to."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._is_shown = stream.isatty()
        self._drawn_at = float("-inf")

    def draw(self, what: str, done: float, whole: float, unit: str) -> None:
        now = time.monotonic()
        if self._is_shown and now - self._drawn_at >= INTERVAL_S:
            self._drawn_at = now
            self._stream.write("\r\x1b[K" + progress_line(what, done, whole, unit))
            self._stream.flush()

    def clear(self) -> None:
        if self._is_shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def tell(self, what: str) -> None:
        """A line that stays."""
        self.clear()
        print(what, file=self._stream, flush=True)
