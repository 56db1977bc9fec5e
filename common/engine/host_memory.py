"""How much memory this process may still take: the machine's, its control groups', and what fits in shared memory."""

import os
from pathlib import Path

_UNLIMITED = 1 << 60


def available_memory_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """The least of what the machine has available and what each control group above this process leaves.

    Page cache counts as available: mapped weights live there. Raises OSError where /proc cannot be read.
    """
    return min([_machine_available(proc), *_cgroup_rooms(proc, cgroups)])


def shared_memory_bytes(path: Path = Path("/dev/shm")) -> int | None:
    """Free bytes in the file system of POSIX shared memory (64 MiB in a container by default); None where there is none."""
    try:
        status = os.statvfs(path)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def _machine_available(proc: Path) -> int:
    for line in (proc / "meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{proc / 'meminfo'} does not say MemAvailable")


def _cgroup_rooms(proc: Path, cgroups: Path) -> list[int]:
    """What each limited control group leaves. Inside a container the group's own path may not be visible, its root is."""
    rooms: list[int] = []
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return rooms
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            rooms += _rooms_upwards(cgroups, group, limit="memory.max", usage="memory.current", reclaimable="inactive_file")
        elif "memory" in controllers.split(","):
            names = {"limit": "memory.limit_in_bytes", "usage": "memory.usage_in_bytes", "reclaimable": "total_inactive_file"}
            rooms += _rooms_upwards(cgroups / "memory", group, **names)
    return rooms


def _rooms_upwards(root: Path, group: str, *, limit: str, usage: str, reclaimable: str) -> list[int]:
    rooms: list[int] = []
    folder = root / group.lstrip("/")
    while folder.is_relative_to(root):
        most = _number(folder / limit)
        if most is not None and most < _UNLIMITED:
            used = (_number(folder / usage) or 0) - _statistic(folder / "memory.stat", reclaimable)
            rooms.append(max(0, most - max(0, used)))
        folder = folder.parent
    return rooms


def _number(path: Path) -> int | None:
    """None where the file is missing or says "max"."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _statistic(path: Path, name: str) -> int:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)
