"""Which builds of the kernels there are, what each needs of a CPU, and which is best here."""

import platform
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuVariant:
    """One build. `needs` are names as /proc/cpuinfo has them; `flags` are for GCC and Clang, `zig_march` for Zig's Clang."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]
    zig_march: str


_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_AVX512_FLAGS = ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
VARIANTS = (
    CpuVariant(
        name="avx512bf16",
        needs=_AVX512 | {"avx512_bf16", "avx512_vnni"},
        flags=(*_AVX512_FLAGS, "-mavx512bf16", "-mavx512vnni"),
        zig_march="x86_64_v4+avx512bf16+avx512vnni",
    ),
    CpuVariant(name="avx512", needs=_AVX512, flags=_AVX512_FLAGS, zig_march="x86_64_v4"),
    CpuVariant(name="avx2", needs=_AVX2, flags=("-mavx2", "-mfma", "-mf16c"), zig_march="x86_64_v3"),
)
"""Best first."""


def cpu_features(cpu_info: Path = _CPU_INFO) -> frozenset[str]:
    """The features of the first CPU; none where this is no x86-64 Linux."""
    if platform.machine().lower() not in {"x86_64", "amd64"} or not cpu_info.exists():
        return frozenset()
    for line in cpu_info.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def runnable_variants(features: Collection[str]) -> tuple[CpuVariant, ...]:
    """Those that a CPU with these features can run, best first."""
    return tuple(variant for variant in VARIANTS if variant.needs <= frozenset(features))
