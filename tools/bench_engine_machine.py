"""On which machine `bench-engine` measured, and whether it was quiet."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from common.runtime.host_cpu import host_cpu

_FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
)
_LOOK_S = 1.0
_QUIET_SHARE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """`busy_share` is the part of a second, before anything was measured, in which others used the cores to be measured."""

    cpu: str
    features: tuple[str, ...]
    cores: tuple[int, ...]
    load_average: float
    busy_share: float

    @property
    def quiet(self) -> bool:
        return self.busy_share <= _QUIET_SHARE

    def describe(self) -> str:
        cores = ",".join(map(str, self.cores))
        return (
            f"{self.cpu} ({', '.join(self.features) or 'none of the features looked for'}); core {cores} of {os.cpu_count()}; "
            f"load {self.load_average:.2f}; others used {self.busy_share:.0%} of the measured core(s) before the start"
        )


def look_at_machine(cores: tuple[int, ...]) -> Machine:
    """Takes a second, in which this process sleeps."""
    before = _busy_s(cores)
    time.sleep(_LOOK_S)
    busy = (_busy_s(cores) - before) / _LOOK_S / max(1, len(cores))
    cpu = host_cpu()
    features = tuple(feature for feature in _FEATURES if feature in cpu.flags)
    return Machine(cpu=cpu.name, features=features, cores=cores, load_average=os.getloadavg()[0], busy_share=max(0.0, busy))


def cpu_name() -> str:
    return host_cpu().name


def _busy_s(cores: tuple[int, ...], stat: Path = Path("/proc/stat")) -> float:
    """Seconds in which these cores did something, or were taken away by the machine beneath this one."""
    wanted = {f"cpu{core}" for core in cores}
    ticks = 0
    for line in stat.read_text(encoding="ascii").splitlines():
        name, *fields = line.split()
        if name in wanted:
            user, nice, system, _idle, _iowait, interrupts, soft_interrupts, stolen = map(int, fields[:8])
            ticks += user + nice + system + interrupts + soft_interrupts + stolen
    return ticks / os.sysconf("SC_CLK_TCK")
