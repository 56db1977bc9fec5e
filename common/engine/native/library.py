"""The built library behind ctypes: the only module that knows its functions and its structures.

ctypes lets other Python threads run during a call. Addresses are those of arrays that the caller keeps alive until then.
"""

import ctypes
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from ctypes import POINTER, Array, Structure, byref, c_char_p, c_float, c_int, c_int32, c_long, c_void_p
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.engine.native.build import BuildError, library_path
from common.engine.native.cpu_variant import CpuVariant, cpu_features, runnable_variants
from common.engine.quantized_matrix import QuantizedMatrix
from common.values.errors import ModelError
from common.values.kv_layout import KvLayout

Floats = NDArray[np.float32]
_LANES = 16
_SLACK_BYTES = 256
"""Of each matrix, for its alignment."""
logger = logging.getLogger(__name__)


class LayerStruct(Structure):
    """`Layer` of llama_step.h. Addresses of packed matrices and of float32 vectors; 0 where there is none."""

    _fields_ = (
        *((name, c_void_p) for name in ("qkv", "output", "gate_up", "down", "input_norm", "middle_norm", "query_norm", "key_norm")),
        *((name, c_void_p) for name in ("qkv_bias", "output_bias", "gate_up_bias", "down_bias")),
        ("window", c_int32),
        ("rotary", c_int32),
    )


class ModelStruct(Structure):
    """`Model` of llama_step.h."""

    _fields_ = (
        *((name, c_int32) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate")),
        ("epsilon", c_float),
        ("scale", c_float),
        ("layer", POINTER(LayerStruct)),
        *((name, c_void_p) for name in ("final_norm", "head", "embedding")),
    )


class BatchStruct(Structure):
    """`Batch` of llama_step.h."""

    _fields_ = (
        *((name, c_int32) for name in ("tokens", "sequences", "kept", "cache_bf16", "block_size")),
        *((name, c_void_p) for name in ("ids", "positions", "owners", "sequence", "keep", "cosine", "sine", "cache", "logits")),
    )


class CacheStruct(Structure):
    """`Cache` of attention.h. Strides in items."""

    _fields_ = (
        ("data", c_void_p),
        ("bf16", c_int),
        *((name, c_long) for name in ("block_stride", "layer_stride", "head_stride", "value_offset", "block_size")),
    )


class AttentionStruct(Structure):
    """`Attention` of attention.h."""

    _fields_ = (
        ("queries", c_void_p),
        ("query_stride", c_long),
        ("out", c_void_p),
        *((name, c_long) for name in ("out_stride", "heads", "kv_heads", "head_dim", "layer")),
        ("scale", c_float),
        ("softcap", c_float),
        ("window", c_long),
        ("sinks", c_void_p),
    )


SEQUENCE_DTYPE = np.dtype([("first", np.int64), ("start", np.int64), ("count", np.int64), ("table", np.uint64)])
"""`Sequence` of attention.h; `table` is the address of int32 block numbers."""


class NativeLibrary:
    """One loaded variant. Its functions are called by the classes of this module and by the tests."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.functions = functions = ctypes.CDLL(str(path))
        functions.segue_variant.restype = c_char_p
        functions.segue_engine_new.argtypes = (c_int,)
        functions.segue_engine_new.restype = c_void_p
        functions.segue_engine_free.argtypes = (c_void_p,)
        functions.segue_weight_memory_new.argtypes = (c_long,)
        functions.segue_weight_memory_new.restype = c_void_p
        functions.segue_weight_memory_free.argtypes = (c_void_p,)
        functions.segue_pack.argtypes = (c_void_p, c_long, c_long, c_int, c_void_p)
        functions.segue_pack.restype = c_void_p
        functions.segue_pack_blocks.argtypes = (c_void_p, c_long, c_long, c_int, c_void_p)
        functions.segue_pack_blocks.restype = c_void_p
        functions.segue_packed_free.argtypes = (c_void_p,)
        functions.segue_gemm.argtypes = (c_void_p, c_void_p, c_long, c_void_p, c_void_p, c_long, c_long, c_void_p)
        functions.segue_attention.argtypes = (c_void_p, POINTER(CacheStruct), POINTER(AttentionStruct), c_void_p, c_long)
        functions.segue_norm.argtypes = (c_void_p, c_void_p, c_void_p, c_long, c_long, c_float)
        functions.segue_rotate.argtypes = (c_void_p, c_void_p, c_void_p, c_long, c_long)
        functions.segue_gate.argtypes = (c_void_p, c_void_p, c_long, c_long)
        functions.segue_exponential.argtypes = (c_void_p, c_void_p, c_long)
        functions.segue_step.argtypes = (c_void_p, POINTER(ModelStruct), POINTER(BatchStruct))
        functions.segue_draw.argtypes = (c_void_p, c_void_p, c_long, c_long, POINTER(c_void_p), c_void_p, c_long)
        functions.segue_score.argtypes = (c_void_p, c_void_p, c_long, c_long, c_void_p, c_long, c_void_p, c_long)
        for name in (
            "weight_memory_free",
            "packed_free",
            "engine_free",
            "gemm",
            "attention",
            "norm",
            "rotate",
            "gate",
            "exponential",
            "step",
            "draw",
            "score",
        ):
            getattr(functions, f"segue_{name}").restype = None
        self.variant = functions.segue_variant().decode()

    @property
    def kernels(self) -> str:
        """What a fingerprint carries."""
        return f"native-{self.variant}"


def load_library(environment: Mapping[str, str]) -> NativeLibrary | None:
    """The best library for this CPU, or None with a warning: then everything runs in torch."""
    variants = runnable_variants(cpu_features())
    if not variants:
        logger.warning("own kernels not used: they are for x86-64 with AVX2 or better")
        return None
    try:
        return load_variant(variants[0], environment)
    except BuildError as error:
        logger.warning("own kernels not used: %s", error)
        return None


def load_variant(variant: CpuVariant, environment: Mapping[str, str]) -> NativeLibrary:
    """Raises BuildError. The CPU must be able to run it."""
    path = library_path(variant, environment)
    try:
        return NativeLibrary(path)
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from error


class WeightMemory:
    """One run of memory for the matrices of a model, which are read the quicker for lying behind each other."""

    def __init__(self, library: NativeLibrary, shapes: Iterable[tuple[int, int]], item_bytes: int) -> None:
        """Room for matrices of these `shapes` (outputs, inputs), given in any order or joined. What is not used takes no memory;
        what does not fit lies elsewhere."""
        rooms = ((-(-outputs // _LANES) * _LANES * inputs * item_bytes + _SLACK_BYTES) for outputs, inputs in shapes)
        self.address: int | None = library.functions.segue_weight_memory_new(sum(rooms))
        if self.address is not None:
            weakref.finalize(self, library.functions.segue_weight_memory_free, self.address)


class PackedMatrix:
    """Weights `[outputs, inputs]` in the kernels' own order and memory. The array given may go afterwards.

    bf16 weights are given as uint16 bits; their `inputs` must be even. Quantised ones keep their blocks: a product with them
    has the bits of one with their expansion.
    """

    def __init__(
        self,
        library: NativeLibrary,
        weights: NDArray[np.float32] | NDArray[np.uint16] | QuantizedMatrix,
        memory: WeightMemory | None = None,
    ) -> None:
        self._memory = None if memory is None else memory.address
        self.outputs, self.inputs = (int(size) for size in weights.shape)
        address = self._blocks(library, weights) if isinstance(weights, QuantizedMatrix) else self._rows(library, weights)
        if not address:
            raise ModelError(f"there is no memory for weights of {self.outputs} x {self.inputs}")
        self.address: int = address
        weakref.finalize(self, library.functions.segue_packed_free, address)

    def _blocks(self, library: NativeLibrary, weights: QuantizedMatrix) -> int | None:
        blocks = np.ascontiguousarray(weights.blocks)
        pack: Callable[[int, int, int, int, int | None], int | None] = library.functions.segue_pack_blocks
        return pack(blocks.ctypes.data, self.outputs, self.inputs, int(weights.kind), self._memory)

    def _rows(self, library: NativeLibrary, weights: NDArray[np.float32] | NDArray[np.uint16]) -> int | None:
        rows = np.ascontiguousarray(weights)
        bf16 = rows.dtype == np.uint16
        if rows.dtype not in (np.float32, np.uint16) or (bf16 and self.inputs % 2):
            raise ModelError(f"weights of {rows.shape} in {rows.dtype} cannot be packed")
        pack: Callable[[int, int, int, int, int | None], int | None] = library.functions.segue_pack
        return pack(rows.ctypes.data, self.outputs, self.inputs, int(bf16), self._memory)


class NativeEngine:
    """The threads and the scratch memory of one user. Its calls must not overlap."""

    def __init__(self, library: NativeLibrary, threads: int = 1) -> None:
        self.library = library
        self.threads = threads
        self.address: int = library.functions.segue_engine_new(threads)
        weakref.finalize(self, library.functions.segue_engine_free, self.address)

    def gemm(self, x: Floats, weights: PackedMatrix, y: Floats, bias: Floats | None = None) -> None:
        """`y[M, outputs] = x[M, inputs] * weights^T + bias`; rows may be strided."""
        self.gemm_at(x.ctypes.data, x.strides[0] // 4, weights, y.ctypes.data, y.strides[0] // 4, len(x), _address(bias))

    def gemm_at(self, x: int, x_stride: int, weights: PackedMatrix, y: int, y_stride: int, rows: int, bias: int | None) -> None:
        """The same from addresses; strides in floats."""
        self.library.functions.segue_gemm(self.address, x, x_stride, weights.address, y, y_stride, rows, bias)

    def attention(self, cache: CacheStruct, attention: AttentionStruct, sequences: NDArray[np.void]) -> None:
        """Queries are attended over what the cache holds; see attention.h."""
        functions = self.library.functions
        functions.segue_attention(self.address, byref(cache), byref(attention), sequences.ctypes.data, len(sequences))

    def step(self, model: ModelStruct, batch: BatchStruct) -> None:
        """A whole forward; see llama_step.h."""
        self.library.functions.segue_step(self.address, byref(model), byref(batch))

    def draw(self, logits: int, stride: int, vocabulary: int, rows: Array[c_void_p], drawn: int, count: int) -> None:
        """A token from each row of float32 logits, which are changed; see draw.h."""
        self.library.functions.segue_draw(self.address, logits, stride, vocabulary, rows, drawn, count)

    def score(self, logits: int, stride: int, vocabulary: int, tokens: int, alternatives: int, scored: int, count: int) -> None:
        """The log-probability of one int64 token in each row."""
        self.library.functions.segue_score(self.address, logits, stride, vocabulary, tokens, alternatives, scored, count)


def cache_struct(layout: KvLayout, address: int) -> CacheStruct:
    """The cache at `address` in the order `[blocks, layers, 2, kv_heads, block_size, head_dim]`."""
    head = layout.block_size * layout.head_dim
    return CacheStruct(
        data=address,
        bf16=int(layout.dtype == "bfloat16"),
        block_stride=layout.layers * 2 * layout.kv_heads * head,
        layer_stride=2 * layout.kv_heads * head,
        head_stride=head,
        value_offset=layout.kv_heads * head,
        block_size=layout.block_size,
    )


def _address(array: Floats | None) -> int | None:
    return None if array is None else array.ctypes.data
