"""The line that shows on a terminal how far a point is."""

import sys
from typing import TextIO

from tools.bench_load.point_run import Progress

WIDTH = 30


def progress_line(title: str, progress: Progress, elapsed_s: float) -> str:
    """Ended requests as full cells, those under way as half ones."""
    cells = max(1, progress.planned)
    done = WIDTH * progress.ended // cells
    running = WIDTH * progress.sent // cells - done
    bar = "█" * done + "▒" * running + "·" * (WIDTH - done - running)
    failed = f", {progress.failed} failed" if progress.failed else ""
    under_way = progress.sent - progress.ended
    return f"{title} {bar} {progress.ended}/{progress.planned}, {under_way} under way{failed}, {elapsed_s:.0f} s"


class ProgressBar:
    """Draws on a terminal only, at most ten times a second: it must not disturb what it shows."""

    INTERVAL_S = 0.1

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._is_shown = stream.isatty()
        self._drawn_at = float("-inf")

    def draw(self, title: str, progress: Progress, elapsed_s: float, *, now: float) -> None:
        is_last = progress.ended == progress.planned
        if self._is_shown and (is_last or now - self._drawn_at >= self.INTERVAL_S):
            self._drawn_at = now
            self._stream.write("\r\x1b[K" + progress_line(title, progress, elapsed_s) + ("\n" if is_last else ""))
            self._stream.flush()
