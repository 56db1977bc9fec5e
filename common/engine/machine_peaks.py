"""What this machine's cores can do at most, by our own loops: operations a second in registers, bytes read a second.

The loops are in `native/peaks.cpp`. Where they cannot be built, reading is measured by numpy, which comes within a fifth of them,
and the peak is what torch reaches (see torch_peaks.py).
"""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from common.engine.native.library import NativeLibrary, load_library

Clock = Callable[[], float]
"""Seconds: `time.perf_counter`, or `time.process_time` where other programs are on the core too."""
READ_BYTES: Final = 256 << 20
"""Several times the largest caches that one core has for itself."""
_STREAMS: Final = (1, 2)
_RATE_S: Final = 0.05
"""How long one measurement of a loop should take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisterLoop:
    """A loop of peaks.cpp by its `number` there; `dtype` is that of its factors (int8 for whole numbers)."""

    number: int
    name: str
    dtype: str


_LOOPS: Final = (
    RegisterLoop(number=0, name="registers, AVX2", dtype="float32"),
    RegisterLoop(number=1, name="registers, AVX-512", dtype="float32"),
    RegisterLoop(number=2, name="registers, AVX-512 BF16", dtype="bfloat16"),
    RegisterLoop(number=3, name="registers, AVX-512 VNNI", dtype="int8"),
)


class MachinePeaks:
    """Measures when asked, on the cores that the calling thread may use: one, if the caller has pinned itself to one."""

    def __init__(self, environment: Mapping[str, str], clock: Clock) -> None:
        self._clock = clock
        library = load_library(environment)
        self._functions = None if library is None else _declared(library)
        self._memory = np.ones(READ_BYTES // 8)

    @property
    def loops(self) -> tuple[RegisterLoop, ...]:
        """Those that this CPU has."""
        functions = self._functions
        if functions is None:
            return ()
        return tuple(loop for loop in _LOOPS if functions.segue_peak_available(loop.number))

    @property
    def absent_loops(self) -> tuple[RegisterLoop, ...]:
        return tuple(loop for loop in _LOOPS if loop not in self.loops)

    def read_bytes_per_s(self) -> float:
        """One reading of READ_BYTES by the quickest of the ways that there are."""
        ways = (self._numpy_read_s,) if self._functions is None else (lambda: self._read_s(1), lambda: self._read_s(2))
        return READ_BYTES / min(way() for way in ways)

    def operations_per_s(self, loop: RegisterLoop) -> float:
        assert self._functions is not None, "there are no loops without the library"
        rounds = 100_000
        while True:
            began = self._clock()
            operations = float(self._functions.segue_peak_run(loop.number, rounds))
            took = self._clock() - began
            if took >= _RATE_S / 2:
                return operations / took
            rounds *= 4

    def _read_s(self, streams: int) -> float:
        assert self._functions is not None
        began = self._clock()
        self._functions.segue_peak_read(self._memory.ctypes.data, READ_BYTES, streams)
        return self._clock() - began

    def _numpy_read_s(self) -> float:
        began = self._clock()
        float(self._memory.sum())
        return self._clock() - began


def _declared(library: NativeLibrary) -> ctypes.CDLL:
    functions = library.functions
    functions.segue_peak_available.argtypes = (ctypes.c_int,)
    functions.segue_peak_available.restype = ctypes.c_int
    functions.segue_peak_run.argtypes = (ctypes.c_int, ctypes.c_long)
    functions.segue_peak_run.restype = ctypes.c_double
    functions.segue_peak_read.argtypes = (ctypes.c_void_p, ctypes.c_long, ctypes.c_long)
    functions.segue_peak_read.restype = None
    return functions
