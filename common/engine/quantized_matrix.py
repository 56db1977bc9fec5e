"""A weight matrix in blocks of 32 numbers along its rows, as GGUF stores them: the form in which quantised weights are kept.

A number of a block is `scale * q`, or `scale * q + minimum`; both are float16. Only the kinds that the kernels multiply
with as they are exist here; tensors of GGUF's other kinds are expanded when a file is converted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from common.values.errors import ModelError

BLOCK = 32


class BlockKind(IntEnum):
    """With GGUF's numbers, which the kernels use too."""

    Q4_0 = 2
    Q4_1 = 3
    Q8_0 = 8

    @property
    def block_bytes(self) -> int:
        return GGML_QUANT_SIZES[GGMLQuantizationType(self)][1]

    def row_bytes(self, inputs: int) -> int:
        return inputs // BLOCK * self.block_bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedMatrix:
    """`blocks [rows, bytes of a row]`."""

    kind: BlockKind
    blocks: npt.NDArray[np.uint8]

    def __post_init__(self) -> None:
        if self.blocks.ndim != 2 or self.blocks.dtype != np.uint8 or self.blocks.shape[1] % self.kind.block_bytes:
            raise ModelError(f"{self.blocks.dtype} of {self.blocks.shape} are no rows of {self.kind.name} blocks")

    @property
    def shape(self) -> tuple[int, int]:
        """Of the expanded matrix."""
        return self.blocks.shape[0], self.blocks.shape[1] // self.kind.block_bytes * BLOCK

    def expanded(self) -> npt.NDArray[np.float32]:
        return np.asarray(dequantize(self.blocks, GGMLQuantizationType(self.kind)), dtype=np.float32)


def can_be_quantized(shape: Sequence[int]) -> bool:
    """Whether rows are whole blocks."""
    return len(shape) == 2 and shape[1] > 0 and shape[1] % BLOCK == 0


def quantized(weights: npt.NDArray[np.float32], kind: BlockKind) -> QuantizedMatrix:
    """Each number rounded to the nearest that its block can hold."""
    return QuantizedMatrix(kind=kind, blocks=np.ascontiguousarray(quantize(weights, GGMLQuantizationType(kind))))


def stacked(parts: Sequence[QuantizedMatrix]) -> QuantizedMatrix | None:
    """The rows below each other, or None where the kinds differ."""
    if any(part.kind != parts[0].kind for part in parts):
        return None
    blocks = parts[0].blocks if len(parts) == 1 else np.concatenate([part.blocks for part in parts])
    return QuantizedMatrix(kind=parts[0].kind, blocks=blocks)
