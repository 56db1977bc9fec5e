"""Sharing out the machine's cores, so that no two workers of this user compute on the same one.

A claim is an flock on a file per core, held by the open file: it ends with its process, however that ends. Which cores to
take is a pure function; only cores in the process's own affinity set are ever used.
"""

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.values.errors import SettingsError


@dataclass(frozen=True, slots=True, kw_only=True)
class CorePlan:
    """`workers` has one tuple of cores a worker; `shared` says that others compute on some of these cores too."""

    workers: tuple[tuple[int, ...], ...]
    shared: bool


def plan_cores(free: Sequence[int], *, workers: int, threads: int | None = None) -> CorePlan:
    """Give each worker `threads` cores of `free` (best first), or an equal part of them.

    Gateway and brokers keep one core for themselves where each worker has one without it. With fewer cores than workers,
    workers share cores in turn.
    """
    if not free:
        raise SettingsError("no core to run on")
    if threads is None:
        usable = len(free) - 1 if len(free) > workers else len(free)
        threads = max(1, usable // workers)
    if workers * threads > len(free):
        turns = tuple(
            tuple(sorted({free[(index * threads + part) % len(free)] for part in range(threads)})) for index in range(workers)
        )
        return CorePlan(workers=turns, shared=True)
    taken = tuple(tuple(sorted(free[index * threads : (index + 1) * threads])) for index in range(workers))
    return CorePlan(workers=taken, shared=False)


def by_preference(cores: Iterable[int], siblings_of: Callable[[int], frozenset[int]]) -> tuple[int, ...]:
    """One hardware thread of each physical core first, their siblings after: two workers meet on one core only when they must."""
    ordered = sorted(cores)
    available = set(ordered)
    return tuple(sorted(ordered, key=lambda core: (sorted(siblings_of(core) & available).index(core), core)))


def hardware_siblings(core: int) -> frozenset[int]:
    """The hardware threads that share a physical core with this one, itself included."""
    try:
        text = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text()
    except OSError:
        return frozenset({core})
    found = {core}
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


class CoreClaims:
    """Claims that this process holds. `close` gives them back; so does its death."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[int, int] = {}

    @property
    def held(self) -> tuple[int, ...]:
        return tuple(sorted(self._held))

    def free(self, cores: Iterable[int]) -> tuple[int, ...]:
        """Those of `cores` that nobody else has claimed, in their order; they are ours from now on."""
        return tuple(core for core in cores if core in self._held or self._claim(core))

    def keep_only(self, cores: Iterable[int]) -> None:
        for core in set(self._held) - set(cores):
            os.close(self._held.pop(core))

    def close(self) -> None:
        self.keep_only(())

    def _claim(self, core: int) -> bool:
        descriptor = os.open(self._folder / f"core-{core}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._held[core] = descriptor
        return True


def private_folder(name: str, *, base: str | None = None) -> Path:
    """A folder of mode 0700 that is this user's alone: below XDG_RUNTIME_DIR, or a name with the user's id below the
    temporary folder. Raises SettingsError where somebody else has put something there."""
    root = base if base is not None else os.environ.get("XDG_RUNTIME_DIR", "")
    usable = bool(root) and os.path.isdir(root) and os.access(root, os.W_OK)
    parent = Path(root) / "segue" if usable else Path(tempfile.gettempdir()) / f"segue-{os.getuid()}"
    for folder in (parent, parent / name):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise SettingsError(f"{folder} must be a folder of yours with mode 0700; remove it and start again")
    return parent / name


def own_cores() -> tuple[int, ...]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))
