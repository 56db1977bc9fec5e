"""Tries a dtype with the kernels on a model's shapes, in well under a second: random weights, some of its layers. Loads no torch.

Enough layers are made that their weights do not fit a cache, as the model's would not. Of a large model the layers are made
smaller, all their sides alike: their time is proportional to their elements either way. Candidates take turns, and the least
time of each counts, so that whatever else runs on the machine disturbs none of them more than the others.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.engine.dtype_choice import ROWS, DtypeTrial
from common.engine.model_config import ModelConfig
from common.engine.native.library import (
    SEQUENCE_DTYPE,
    BatchStruct,
    LayerStruct,
    ModelStruct,
    NativeEngine,
    NativeLibrary,
    PackedMatrix,
    WeightMemory,
)
from common.engine.quantized_matrix import BLOCK, BlockKind, QuantizedMatrix, can_be_quantized, quantized
from common.engine.step_limits import layer_elements, weight_elements
from common.values.kv_layout import KvDtype

PREFILL_TOKENS: Final = 96
CONTEXT: Final = 256
_BLOCK_SIZE: Final = 16
_ELEMENTS: Final = 40_000_000
"""Of all layers that are made: 80 MB in bfloat16."""
_LAYER_ELEMENTS: Final = 16_000_000
_VOCABULARY: Final = 512
_ROUNDS: Final = 3
_LONGEST_S: Final = 1.0
Weights = NDArray[np.float32] | NDArray[np.uint16] | QuantizedMatrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """`kind` None: weights of `dtype`, else blocks, with keys and values of `dtype`."""

    dtype: KvDtype
    kind: BlockKind | None = None

    @property
    def weights(self) -> str:
        return self.dtype if self.kind is None else self.kind.name


def try_dtypes(library: NativeLibrary, config: ModelConfig, candidates: Sequence[Candidate]) -> list[DtypeTrial]:
    """In the order of the candidates; on one thread. `config` is of the Llama family."""
    shape = _trial_shape(config)
    models = [_TrialModel(library, shape, candidate) for candidate in candidates]
    times = [[_Least(), _Least(), _Least()] for _ in models]
    began = time.perf_counter()
    for number in range(_ROUNDS):
        for model, (prefill, single, rows) in zip(models, times, strict=True):
            prefill.add(model.prefill)
            single.add(lambda model=model: model.decode(1))  # type: ignore[misc]
            rows.add(lambda model=model: model.decode(ROWS))  # type: ignore[misc]
        if number and time.perf_counter() - began > _LONGEST_S:
            break
    layers = config.layers * layer_elements(config) / (shape.layers * layer_elements(shape))
    whole = weight_elements(config) / weight_elements(shape)
    return [
        DtypeTrial(
            dtype=candidate.dtype,
            weights=candidate.weights,
            prefill_token_s=layers * prefill.seconds / PREFILL_TOKENS,
            single_step_s=whole * single.seconds,
            rows_step_s=whole * rows.seconds,
        )
        for candidate, (prefill, single, rows) in zip(candidates, times, strict=True)
    ]


class _Least:
    """The least time of something that is done now and then."""

    def __init__(self) -> None:
        self.seconds = float("inf")

    def add(self, run: Callable[[], None]) -> None:
        began = time.perf_counter()
        run()
        self.seconds = min(self.seconds, time.perf_counter() - began)


def _trial_shape(config: ModelConfig) -> ModelConfig:
    shape = config
    while layer_elements(shape) > _LAYER_ELEMENTS and shape.kv_heads > 1 and shape.heads % 2 == shape.kv_heads % 2 == 0:
        hidden, wide = _half(shape.hidden_size), _half(shape.intermediate_size)
        shape = replace(shape, heads=shape.heads // 2, kv_heads=shape.kv_heads // 2, hidden_size=hidden, intermediate_size=wide)
    layers = max(1, min(shape.layers, -(-_ELEMENTS // layer_elements(shape))))
    return replace(shape, layers=layers, vocab_size=min(shape.vocab_size, _VOCABULARY))


def _half(size: int) -> int:
    """Rows stay whole blocks."""
    return max(BLOCK, size // 2 // BLOCK * BLOCK)


class _TrialModel:
    """Random weights packed for the kernels, a cache, and two kinds of steps."""

    def __init__(self, library: NativeLibrary, shape: ModelConfig, candidate: Candidate) -> None:
        self._engine = NativeEngine(library, 1)
        self._shape = shape
        self._random = np.random.default_rng(7)
        self._kept: list[PackedMatrix | NDArray[np.float32]] = []
        self._bf16 = candidate.dtype == "bfloat16"
        heads, kv_heads = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        hidden, wide = shape.hidden_size, shape.intermediate_size
        sides = {
            "qkv": (heads + 2 * kv_heads, hidden),
            "output": (hidden, heads),
            "gate_up": (2 * wide, hidden),
            "down": (hidden, wide),
        }
        weights = {name: self._weights(rows, inputs, candidate) for name, (rows, inputs) in sides.items()}
        room = [side for side in sides.values() for _ in range(shape.layers)]
        self._memory = WeightMemory(library, [*room, (shape.vocab_size, hidden)], 2 if self._bf16 else 4)
        norm = self._vector(np.ones(hidden, dtype=np.float32))
        norms = {"input_norm": norm, "middle_norm": norm}
        layers = [
            LayerStruct(**{name: self._packed(library, matrix) for name, matrix in weights.items()}, **norms, window=0, rotary=1)
            for _ in range(shape.layers)
        ]
        head = self._packed(library, self._weights(shape.vocab_size, hidden, candidate))
        self._layers = (LayerStruct * len(layers))(*layers)
        self._model = ModelStruct(
            layers=shape.layers,
            hidden=hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            intermediate=wide,
            epsilon=1e-5,
            scale=shape.head_dim**-0.5,
            layer=self._layers,
            final_norm=norm,
            head=head,
            embedding=head,
        )
        blocks = ROWS * (CONTEXT // _BLOCK_SIZE)
        self._cache = np.zeros(blocks * shape.layers * 2 * kv_heads * _BLOCK_SIZE, dtype=np.uint16 if self._bf16 else np.float32)
        angles = np.outer(np.arange(CONTEXT), np.linspace(1.0, 0.01, shape.head_dim // 2))
        self._cosine, self._sine = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        self._tables = np.arange(blocks, dtype=np.int32).reshape(ROWS, -1)

    def prefill(self) -> None:
        """A prompt from its beginning."""
        self._step(rows=1, start=0, count=PREFILL_TOKENS)

    def decode(self, rows: int) -> None:
        """One token for each of `rows` rows, which see the whole context."""
        self._step(rows=rows, start=CONTEXT - 1, count=1)

    def _step(self, *, rows: int, start: int, count: int) -> None:
        tokens = rows * count
        ids = np.arange(tokens, dtype=np.int32) % self._shape.vocab_size
        positions = np.tile(np.arange(start, start + count, dtype=np.int32), rows)
        owners = np.repeat(np.arange(rows, dtype=np.int32), count)
        sequences = np.empty(rows, dtype=SEQUENCE_DTYPE)
        sequences["first"], sequences["start"], sequences["count"] = np.arange(rows) * count, start, count
        sequences["table"] = [self._tables[row].ctypes.data for row in range(rows)]
        keep = (np.arange(rows, dtype=np.int32) + 1) * count - 1
        logits = np.empty((rows, self._shape.vocab_size), dtype=np.float32)
        batch = BatchStruct(
            tokens=tokens,
            sequences=rows,
            kept=rows,
            cache_bf16=int(self._bf16),
            block_size=_BLOCK_SIZE,
            ids=ids.ctypes.data,
            positions=positions.ctypes.data,
            owners=owners.ctypes.data,
            sequence=sequences.ctypes.data,
            keep=keep.ctypes.data,
            cosine=self._cosine.ctypes.data,
            sine=self._sine.ctypes.data,
            cache=self._cache.ctypes.data,
            logits=logits.ctypes.data,
        )
        self._engine.step(self._model, batch)

    def _weights(self, rows: int, inputs: int, candidate: Candidate) -> Weights:
        """The numbers repeat: how long a product takes does not depend on them."""
        few = self._random.standard_normal((min(rows, 64), inputs), dtype=np.float32) * inputs**-0.5
        parts = -(-rows // len(few))
        if candidate.kind is not None and can_be_quantized((rows, inputs)):
            blocks = quantized(few, candidate.kind).blocks
            return QuantizedMatrix(kind=candidate.kind, blocks=np.tile(blocks, (parts, 1))[:rows])
        tiled = np.tile(few, (parts, 1))[:rows]
        return (tiled.view(np.uint32) >> 16).astype(np.uint16) if self._bf16 else tiled

    def _packed(self, library: NativeLibrary, matrix: Weights) -> int:
        packed = PackedMatrix(library, matrix, self._memory)
        self._kept.append(packed)
        return packed.address

    def _vector(self, array: NDArray[np.float32]) -> int:
        self._kept.append(array)
        return array.ctypes.data
