"""Reads GGUF files (versions 2 and 3): metadata at once, tensors one by one out of a memory map.

The `gguf` package has a reader, which takes seconds for a vocabulary and reads whatever a damaged file tells it to. This
one checks each length against the file before it believes it, so that a damaged file is an error with a sentence.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from common.values.errors import ModelError

Scalar = str | int | float | bool
Value = Scalar | list[str] | list[int] | list[float] | list[bool]
_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_MAX_ENTRIES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """`shape` is in numpy's order (rows first), the reverse of the file's."""

    name: str
    shape: tuple[int, ...]
    quantization: int
    offset: int
    stored_bytes: int


class GgufFile:
    """One open file. Values are typed on the way out; a missing or wrongly typed one is a ModelError that names its key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes: npt.NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read {path}: {error}") from error
        cursor = _Cursor(path, self._bytes)
        self._values, self.tensors = _read_header(cursor)

    def text(self, key: str, default: str | None = None) -> str:
        value = self._values.get(key, default)
        if isinstance(value, str):
            return value
        raise self._wrong(key, "a text")

    def optional_text(self, key: str) -> str | None:
        return self.text(key) if key in self._values else None

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._values.get(key, default)
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]  # some writers repeat a number for every layer
        if isinstance(value, int):
            return int(value)
        raise self._wrong(key, "one whole number")

    def optional_integer(self, key: str) -> int | None:
        return self.integer(key) if key in self._values else None

    def number(self, key: str, default: float | None = None) -> float:
        """A float32 comes out as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
        value = self._values.get(key, default)
        if isinstance(value, int | float):
            return float(value)
        raise self._wrong(key, "a number")

    def flag(self, key: str, *, default: bool) -> bool:
        value = self._values.get(key, default)
        if isinstance(value, bool):
            return value
        raise self._wrong(key, "true or false")

    def texts(self, key: str) -> list[str]:
        value = self._values.get(key)
        if isinstance(value, list):
            return [item for item in value if isinstance(item, str)]
        raise self._wrong(key, "a list of texts")

    def numbers(self, key: str) -> list[float]:
        value = self._values.get(key)
        if isinstance(value, list):
            return [float(item) for item in value]
        raise self._wrong(key, "a list of numbers")

    def has(self, key: str) -> bool:
        return key in self._values

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor, dequantised."""
        tensor = self.tensors[name]
        kind = GGMLQuantizationType(tensor.quantization)
        try:
            values = dequantize(self.stored(name), kind)
        except NotImplementedError as error:
            raise ModelError(f"{self.path}: {name} is quantised as {kind.name}, which the gguf package cannot read") from error
        return np.asarray(values, dtype=np.float32).reshape(tensor.shape)

    def stored(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's rows as they are in the file, quantised ones as rows of blocks."""
        tensor = self.tensors[name]
        raw = self._bytes[tensor.offset : tensor.offset + tensor.stored_bytes]
        return np.asarray(raw).reshape(-1, _row_bytes(tensor))

    def _wrong(self, key: str, takes: str) -> ModelError:
        state = "is not" if key in self._values else "is missing; it should be"
        return ModelError(f"{self.path}: the entry {key} {state} {takes}")


def _row_bytes(tensor: GgufTensor) -> int:
    return tensor.stored_bytes // max(1, prod(tensor.shape[:-1]))


class _Cursor:
    """Walks through the file; every read is checked against its end."""

    def __init__(self, path: Path, data: npt.NDArray[np.uint8]) -> None:
        self.path, self._data, self.at = path, data, 0
        self.size = len(data)

    def damaged(self, why: str) -> ModelError:
        return ModelError(f"{self.path} is damaged or cut off ({self.size} bytes): {why}. Fetch it again")

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise self.damaged(f"{count} bytes are expected at byte {self.at}")
        self.at += count
        return self._data[self.at - count : self.at].tobytes()

    def u32(self) -> int:
        return int(struct.unpack("<I", self.take(4))[0])

    def u64(self) -> int:
        return int(struct.unpack("<Q", self.take(8))[0])

    def string(self) -> str:
        return self.take(self.u64()).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Value:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        return _plain(np.frombuffer(self.take(self._number_type(kind).itemsize), dtype=self._number_type(kind)))[0]

    def _array(self) -> Value:
        kind, count = self.u32(), self.u64()
        if kind == _STRING:
            return [self.string() for _ in range(min(count, self.size))]
        number = self._number_type(kind)
        return _plain(np.frombuffer(self.take(number.itemsize * count), dtype=number))

    def _number_type(self, kind: int) -> np.dtype[np.generic]:
        if kind not in _NUMBERS:
            raise self.damaged(f"there is no value type {kind}")
        return np.dtype(_NUMBERS[kind])


def _plain(values: npt.NDArray[np.generic]) -> list[int] | list[float] | list[bool]:
    if values.dtype == np.float32:
        return [float(str(value)) for value in values]
    result: list[int] | list[float] | list[bool] = values.tolist()
    return result


def _read_header(cursor: _Cursor) -> tuple[dict[str, Value], dict[str, GgufTensor]]:
    if cursor.size < 24 or cursor.take(4) != b"GGUF":
        raise ModelError(f"{cursor.path} is not a GGUF file")
    version = cursor.u32()
    if version not in (2, 3):
        raise ModelError(f"{cursor.path} is GGUF version {version} (or big-endian); Segue reads versions 2 and 3, little-endian")
    tensor_count, value_count = cursor.u64(), cursor.u64()
    if max(tensor_count, value_count) > _MAX_ENTRIES:
        raise cursor.damaged(f"{tensor_count} tensors and {value_count} entries are announced")
    values: dict[str, Value] = {}
    for _ in range(value_count):
        key = cursor.string()
        values[key] = cursor.value(cursor.u32())
    entries = [_read_tensor_entry(cursor) for _ in range(tensor_count)]
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise cursor.damaged(f"its alignment is {alignment}")
    data_start = -(-cursor.at // alignment) * alignment
    return values, {entry[0]: _locate(cursor, data_start, *entry) for entry in entries}


def _read_tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, dimensions = cursor.string(), cursor.u32()
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise cursor.damaged(f"tensor {name[:80]!r} has {dimensions} dimensions")
    shape = tuple(cursor.u64() for _ in range(dimensions))[::-1]
    return name, shape, cursor.u32(), cursor.u64()


def _locate(cursor: _Cursor, data_start: int, name: str, shape: tuple[int, ...], quantization: int, offset: int) -> GgufTensor:
    try:
        block_elements, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(quantization)]
    except ValueError as error:
        raise ModelError(
            f"{cursor.path}: tensor {name} has the quantisation type {quantization}, unknown to the gguf package"
        ) from error
    if shape[-1] % block_elements:
        raise cursor.damaged(f"tensor {name} has rows of {shape[-1]}, no multiple of {block_elements}")
    stored = prod(shape) // block_elements * block_bytes
    if data_start + offset + stored > cursor.size:
        raise cursor.damaged(f"tensor {name} ends at byte {data_start + offset + stored}")
    return GgufTensor(name=name, shape=shape, quantization=quantization, offset=data_start + offset, stored_bytes=stored)
