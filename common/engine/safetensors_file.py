"""The safetensors container: its header read and checked without loading a byte of weights, and a file written tensor by tensor.

A header is the length of a JSON text (u64, little-endian), the text, then the tensors' bytes without gaps. Reading headers
alone says how much memory a model will need before anything is loaded; writing tensor by tensor keeps a conversion as
small as its largest tensor.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from common.values.errors import ModelError

ITEM_BYTES: dict[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
_NUMPY_TYPES = {"F32": "<f4", "U8": "u1"}
_ALIGNMENT = 64
"""Where our files' first tensor starts, so that mapped weights lie as vector loads like them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHeader:
    """One tensor of a file: its name, safetensors type name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        return self.elements * ITEM_BYTES[self.dtype]


def read_tensor_headers(path: Path) -> list[TensorHeader]:
    """Raises ModelError where the file is not safetensors, or shorter or longer than its header says."""
    size = path.stat().st_size
    with open(path, "rb") as handle:
        start = handle.read(_LENGTH_BYTES)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise ModelError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
        if len(start) < _LENGTH_BYTES or not 2 <= length <= min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES):
            raise ModelError(f"{path} is not a safetensors file, or is cut off within its header ({size} bytes): fetch it again")
        text = handle.read(length)
    headers, data_bytes = _parse_header(path, text)
    expected = _LENGTH_BYTES + length + data_bytes
    if size != expected:
        state = "cut off" if size < expected else "damaged"
        raise ModelError(f"{path} is {state}: its header speaks of {expected} bytes, the file has {size}: fetch it again")
    return headers


def _parse_header(path: Path, text: bytes) -> tuple[list[TensorHeader], int]:
    headers: list[TensorHeader] = []
    end = 0
    try:
        for name, entry in json.loads(text).items():
            if name == "__metadata__":
                continue
            header = TensorHeader(name=name, dtype=entry["dtype"], shape=tuple(int(n) for n in entry["shape"]))
            first, last = entry["data_offsets"]
            if header.dtype not in ITEM_BYTES:
                raise ModelError(f"{path}: tensor {name} has the type {header.dtype}, which Segue does not read")
            if last - first != header.stored_bytes:
                raise ModelError(f"{path} is damaged: tensor {name} has {last - first} bytes, its shape {header.stored_bytes}")
            headers.append(header)
            end = max(end, last)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not a safetensors file, or its header is damaged: fetch it again") from error
    return headers, end


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorToWrite:
    """A tensor of a known shape; `make` computes it only when its turn has come."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], npt.NDArray[np.float32] | npt.NDArray[np.uint8]]
    dtype: Literal["F32", "U8"] = "F32"

    @property
    def stored_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def write_tensor_file(
    path: Path, tensors: Sequence[TensorToWrite], on_progress: Callable[[float], None], metadata: Mapping[str, str] | None = None
) -> None:
    """Write all tensors in the given order; one of them at a time is in memory. Durable when it returns."""
    header = json.dumps(_file_header(tensors, metadata or {}), separators=(",", ":")).encode()
    header += b" " * (-(_LENGTH_BYTES + len(header)) % _ALIGNMENT)
    total = sum(tensor.stored_bytes for tensor in tensors)
    written = 0
    with open(path, "wb") as handle:
        handle.write(len(header).to_bytes(_LENGTH_BYTES, "little") + header)
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.make(), dtype=_NUMPY_TYPES[tensor.dtype])
            if array.shape != tensor.shape:
                raise ModelError(f"tensor {tensor.name} has the shape {array.shape}, expected {tensor.shape}")
            handle.write(array.data)
            written += array.nbytes
            on_progress(written / total)
        handle.flush()
        os.fsync(handle.fileno())


def _file_header(tensors: Iterable[TensorToWrite], metadata: Mapping[str, str]) -> dict[str, object]:
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.stored_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    return entries
