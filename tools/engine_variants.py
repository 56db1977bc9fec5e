"""The ways in which a model can be computed here, each loaded as a worker would load it: forward (torch, native) and weights.

`bench-engine` times them, `eval-engine` compares what they say. Torch is loaded only when the first of them is.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from common.adapters.kv_region import AnonymousMemory, MappedKvRegion, create_region, region_size
from common.engine.executor import Executor
from common.engine.memory_plan import kv_layout
from common.engine.model_files import ModelFolder
from common.engine.quantization_choice import Quantization
from common.ports.kv_transport import KvRegion
from common.values.errors import ModelError
from common.values.kv_layout import KvDtype, KvLayout

if TYPE_CHECKING:
    from common.engine.native.library import NativeLibrary
    from common.engine.watched_forward import WatchedModel

Forward = Literal["torch", "native"]
Weights = Literal["float32", "bfloat16", "float16", "gguf", "int8", "int4"]
"""A dtype; or weights in blocks, multiplied as float32: those that the model came with, or its weights rounded."""
_QUANTIZATION: Mapping[str, Quantization] = {"gguf": "auto", "int8": "int8", "int4": "int4"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    forward: Forward
    weights: Weights

    @property
    def name(self) -> str:
        return f"{self.forward} {self.weights}"

    @property
    def quantized(self) -> bool:
        return self.weights in _QUANTIZATION

    @property
    def dtype(self) -> KvDtype:
        """In which it computes and keeps its KV cache."""
        return "float32" if self.quantized else cast("KvDtype", self.weights)

    @property
    def quantization(self) -> Quantization:
        return _QUANTIZATION.get(self.weights, "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedVariant:
    """Belongs to the thread that loaded it. The region may be shared by variants of the same KV dtype, one at a time."""

    variant: Variant
    executor: Executor
    pool: "KvPool"


class KvPool:
    """Blocks in private memory, filled with small random numbers, so that a decode finds a cache that no prefill has to make."""

    def __init__(self, layout: KvLayout, blocks: int) -> None:
        self.layout = layout
        self._memory = AnonymousMemory(region_size(layout, blocks))
        self.region: MappedKvRegion = create_region(self._memory, layout, blocks, bytes(16))
        content = _random_block(layout)
        for block in range(blocks):
            self.region.block_view(block)[:] = content


def kv_pool(folder: ModelFolder, dtype: KvDtype, *, block_size: int, blocks: int) -> KvPool:
    return KvPool(kv_layout(folder.config(), dtype, block_size), blocks)


def load_variant(folder: ModelFolder, variant: Variant, pool: KvPool, *, threads: int) -> LoadedVariant:
    """Raises ModelError where this machine or this model has no such variant."""
    from common.engine.load_model import load_model
    from common.engine.native.llama_model import misfit
    from common.engine.paged_attention import PAGED_ATTENTION
    from common.engine.torch_step import build_torch_executor

    library = _library(folder, variant)
    model = load_model(folder, dtype=variant.dtype, attn_implementation=PAGED_ATTENTION)
    _refuse_misfit(folder, variant, misfit(model))
    executor = build_torch_executor(
        model,
        pool.layout,
        pool.region.blocks_address,
        pool.region.blocks,
        "cpu",
        library=library,
        quantization=variant.quantization,
        stored=folder.quantized(),
    )
    executor.prepare_thread(threads)
    return LoadedVariant(variant=variant, executor=executor, pool=pool)


def load_watched(folder: ModelFolder, variant: Variant, layout: KvLayout, region: KvRegion) -> "WatchedModel":
    """The same over any region, without the check of the architecture, to compare what it says bit by bit."""
    from common.engine.load_model import load_model
    from common.engine.native.llama_model import misfit
    from common.engine.paged_attention import PAGED_ATTENTION
    from common.engine.watched_forward import WatchedModel

    library = _library(folder, variant)
    model = load_model(folder, dtype=variant.dtype, attn_implementation=PAGED_ATTENTION)
    _refuse_misfit(folder, variant, misfit(model))
    return WatchedModel(model, layout, region, library=library, quantization=variant.quantization, stored=folder.quantized())


def _library(folder: ModelFolder, variant: Variant) -> "NativeLibrary | None":
    from common.engine.native.library import load_library
    from common.engine.paged_attention import register_paged_attention

    register_paged_attention()
    library = load_library(os.environ) if variant.forward == "native" else None
    if variant.forward == "native" and library is None:
        raise ModelError("there are no native kernels here: no compiler, or a CPU without AVX2")
    if variant.weights == "gguf" and not folder.quantized():
        raise ModelError(f"{folder.name} did not come quantised")
    if variant.quantized and library is None:
        raise ModelError("without own kernels quantised weights are kept expanded: as float32")
    return library


def _refuse_misfit(folder: ModelFolder, variant: Variant, reason: str | None) -> None:
    if variant.forward == "native" and reason is not None:
        raise ModelError(f"there is no native forward for {folder.name}: {reason}")


def _random_block(layout: KvLayout) -> bytes:
    numbers = np.random.default_rng(3).standard_normal(layout.block_bytes // layout.item_bytes).astype(np.float32)
    match layout.dtype:
        case "float32":
            return numbers.tobytes()
        case "float16":
            return numbers.astype(np.float16).tobytes()
        case "bfloat16":
            return (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()
