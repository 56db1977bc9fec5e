"""Which CPU this host has, in words that tell apart what computes at different speeds."""

import platform
from dataclasses import dataclass
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
_NUMBERS = ("cpu family", "model", "stepping")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCpu:
    """`numbers` are the maker's family, model and stepping: virtual machines often hide the name."""

    name: str
    numbers: tuple[str, ...]
    flags: frozenset[str]

    def describe(self) -> str:
        return f"{self.name} ({'/'.join(self.numbers)})" if self.numbers else self.name


def host_cpu(info: Path = CPU_INFO) -> HostCpu:
    fields: dict[str, str] = {}
    try:
        text = info.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    return HostCpu(
        name=fields.get("model name") or platform.processor() or platform.machine(),
        numbers=tuple(fields[key] for key in _NUMBERS if key in fields),
        flags=frozenset(fields.get("flags", "").split()),
    )
