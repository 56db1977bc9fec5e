"""What torch's own matrix products reach, by dtype: with our register loops and our own product, the candidates for the peak."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from common.engine.machine_peaks import Clock
from common.engine.native.library import NativeEngine, PackedMatrix, load_library

_ROWS: Final = 512
_SIZE: Final = 2048
_FLOATS: Final = (("float32", torch.float32), ("bfloat16", torch.bfloat16))


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """One way to multiply 512 rows by a square matrix whose side is 2048. `run` does it once."""

    name: str
    dtype: str
    run: Callable[[], object]
    clock: Clock

    def operations_per_s(self) -> float:
        began = self.clock()
        self.run()
        return 2 * _ROWS * _SIZE * _SIZE / (self.clock() - began)


def products(threads: int, clock: Clock, environment: Mapping[str, str]) -> list[Product]:
    """All ways that work here, each tried once. Sets torch's threads."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(1)
    x, w = (torch.randn(rows, _SIZE, generator=generator) for rows in (_ROWS, _SIZE))
    found: list[tuple[str, str, Callable[[], object]]] = []
    for name, dtype in _FLOATS:
        found.append(("torch matmul", name, _matmul(x.to(dtype), w.to(dtype))))
        if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            found.append(("oneDNN, packed", name, _onednn(x.to(dtype), w.to(dtype))))
    found.append(("torch matmul", "int8", _int8(x, w)))
    found += _own(threads, environment, x.numpy(), w)
    return [Product(name=name, dtype=dtype, run=run, clock=clock) for name, dtype, run in found if _works(run)]


def _works(run: Callable[[], object]) -> bool:
    """Not every build of torch has every product; what it lacks raises at the first call, which also warms up."""
    try:
        run()
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return True


def _matmul(x: torch.Tensor, w: torch.Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return x @ w

    return run


def _onednn(x: torch.Tensor, w: torch.Tensor) -> Callable[[], object]:
    packed: list[torch.Tensor] = []

    def run() -> object:
        with torch.inference_mode():
            if not packed:
                packed.append(torch.ops.mkldnn._reorder_linear_weight(w, _ROWS))
            return torch.ops.mkldnn._linear_pointwise(x, packed[0], None, "none", [], "")

    return run


def _int8(x: torch.Tensor, w: torch.Tensor) -> Callable[[], object]:
    left, right = ((part * 20).clamp(-100, 100).to(torch.int8) for part in (x, w))
    return lambda: torch._int_mm(left, right)


def _own(
    threads: int, environment: Mapping[str, str], x: np.ndarray[tuple[int, int], np.dtype[np.float32]], w: torch.Tensor
) -> list[tuple[str, str, Callable[[], object]]]:
    library = load_library(environment)
    if library is None:
        return []
    engine = NativeEngine(library, threads)
    y = np.empty((_ROWS, _SIZE), dtype=np.float32)
    wide = PackedMatrix(library, w.numpy())
    narrow = PackedMatrix(library, w.to(torch.bfloat16).view(torch.uint16).numpy())
    return [
        ("own product", "float32", lambda: engine.gemm(x, wide, y)),
        ("own product", "bfloat16", lambda: engine.gemm(x, narrow, y)),
    ]
