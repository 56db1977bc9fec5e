"""A child's output in a file of bounded size, with the last lines kept at hand for when it dies."""

import re
from collections import deque
from pathlib import Path

MAX_BYTES = 16 << 20
TAIL_LINES = 12
_LEVEL = re.compile(r'^\S+ (warning|error|critical) |"level": ?"(warning|error|critical)"|^Traceback |^\w+(\.\w+)*Error: ')


class ChildLog:
    """Past MAX_BYTES the file becomes `<name>.log.1` (one is kept) and a new one begins."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._bytes = 0
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)

    def write(self, line: str) -> bool:
        """Append a line of the child; True where it is a warning or worse, as `common.runtime.logs` writes them."""
        self._tail.append(line)
        self.note(line)
        return _LEVEL.search(line) is not None

    def note(self, line: str) -> None:
        """Append a line that is not the child's."""
        self._file.write(line + "\n")
        self._bytes += len(line) + 1
        if self._bytes >= MAX_BYTES:
            self._file.close()
            self._path.replace(self._path.with_name(self._path.name + ".1"))
            self._file = self._path.open("a", encoding="utf-8", buffering=1)
            self._bytes = 0

    def tail(self) -> tuple[str, ...]:
        """The child's last lines; forgotten with the call, so that the next start tells its own."""
        lines = tuple(self._tail)
        self._tail.clear()
        return lines

    def close(self) -> None:
        self._file.close()
