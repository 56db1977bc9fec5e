"""Why `segue bench` does not start, or stops."""

from common.values.errors import SegueError


class BenchRefused(SegueError):
    """What was asked cannot be measured; the text says what to change."""
