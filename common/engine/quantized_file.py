"""A model folder's quantised matrices: `quantized.safetensors`, rows of blocks as bytes, the kind of each in the metadata.

The file repeats, smaller, what the folder's float32 weights say; a folder without it is a whole model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from common.engine.quantized_matrix import BLOCK, BlockKind, QuantizedMatrix
from common.engine.safetensors_file import TensorHeader, TensorToWrite, read_tensor_headers, write_tensor_file
from common.values.errors import ModelError

QUANTIZED_FILE = "quantized.safetensors"
_MARK = ("blocks", "gguf")
"""In the metadata of our own files; another program's file of this name is not looked into."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMatrix:
    """One matrix of a file; `read` takes it into memory."""

    path: Path
    header: TensorHeader
    kind: BlockKind

    @property
    def stored_bytes(self) -> int:
        return self.header.stored_bytes

    @property
    def shape(self) -> tuple[int, int]:
        """Of the expanded matrix."""
        return self.header.shape[0], self.header.shape[1] // self.kind.block_bytes * BLOCK

    def read(self) -> QuantizedMatrix:
        return self._rows(0, self.header.shape[0])

    def read_row(self, row: int) -> QuantizedMatrix:
        return self._rows(row, row + 1)

    def _rows(self, first: int, last: int) -> QuantizedMatrix:
        try:
            with safe_open(str(self.path), framework="numpy") as file:
                blocks: npt.NDArray[np.uint8] = file.get_slice(self.header.name)[first:last]
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.path} cannot be read: {error}") from error
        return QuantizedMatrix(kind=self.kind, blocks=blocks)


def write_quantized_file(path: Path, tensors: Sequence[TensorToWrite], kinds: Mapping[str, BlockKind]) -> None:
    """Nothing is written where there are no such tensors."""
    if tensors:
        write_tensor_file(path, tensors, lambda part: None, dict([_MARK]) | {name: kind.name for name, kind in kinds.items()})


def quantized_matrices(folder: Path) -> dict[str, StoredMatrix]:
    """By the names that the same matrices have among the folder's weights; empty where the folder has none.

    Raises ModelError where the file is cut off or damaged.
    """
    path = folder / QUANTIZED_FILE
    if not path.is_file():
        return {}
    headers = read_tensor_headers(path)
    try:
        with safe_open(str(path), framework="numpy") as file:
            kinds = file.metadata() or {}
        if kinds.get(_MARK[0]) != _MARK[1]:
            return {}
        return {header.name: StoredMatrix(path=path, header=header, kind=BlockKind[kinds[header.name]]) for header in headers}
    except (SafetensorError, OSError, KeyError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error
