"""What this machine's cores can do at most, by our own loops: operations a second in registers, bytes read a second.

The loops are in `native/peaks.cpp`. Where they cannot be built, reading is measured by numpy, which comes within a fifth of them,
and the peak is what torch reaches (see torch_peaks.py).
"""

import ctypes
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np

from common.engine.native.library import NativeLibrary, load_library

T = TypeVar("T")
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
    """Measures when asked, with `threads` threads at once on the cores that the process may use: one, if it has pinned itself
    to one."""

    def __init__(self, environment: Mapping[str, str], clock: Clock, *, threads: int = 1) -> None:
        self._clock = clock
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="peak")
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
            operations = self._run_loop(loop.number, rounds)
            took = self._clock() - began
            if took >= _RATE_S / 2:
                return operations / took
            rounds *= 4

    def _run_loop(self, number: int, rounds: int) -> float:
        """The operations of all threads together."""
        assert self._functions is not None
        run = self._functions.segue_peak_run
        return sum(self._at_once(lambda _: float(run(number, rounds))))

    def _read_s(self, streams: int) -> float:
        assert self._functions is not None
        read, address, part = self._functions.segue_peak_read, self._memory.ctypes.data, READ_BYTES // self._threads // 64 * 64
        began = self._clock()
        self._at_once(lambda thread: read(address + thread * part, part, streams))
        return self._clock() - began

    def _numpy_read_s(self) -> float:
        parts = np.array_split(self._memory, self._threads)
        began = self._clock()
        self._at_once(lambda thread: float(parts[thread].sum()))
        return self._clock() - began

    def _at_once(self, work: Callable[[int], T]) -> list[T]:
        """`work` of every thread's number, each in its own thread; ctypes and numpy let them run side by side."""
        return [work(0)] if self._threads == 1 else list(self._pool.map(work, range(self._threads)))


def _declared(library: NativeLibrary) -> ctypes.CDLL:
    functions = library.functions
    functions.segue_peak_available.argtypes = (ctypes.c_int,)
    functions.segue_peak_available.restype = ctypes.c_int
    functions.segue_peak_run.argtypes = (ctypes.c_int, ctypes.c_long)
    functions.segue_peak_run.restype = ctypes.c_double
    functions.segue_peak_read.argtypes = (ctypes.c_void_p, ctypes.c_long, ctypes.c_long)
    functions.segue_peak_read.restype = None
    return functions
