"""Our own kernels inside transformers' modules, for architectures outside the Llama family: exact matrix products, paged attention.

A row of torch's product depends, in its last bits, on how many rows there are; one of ours does not. So a token does not depend
on its neighbours on this path either. Experts that are not linear modules stay torch's.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.pytorch_utils import Conv1D

from common.engine.kv_cache_view import KvCacheView
from common.engine.native.library import (
    SEQUENCE_DTYPE,
    AttentionStruct,
    NativeEngine,
    NativeLibrary,
    PackedMatrix,
    WeightMemory,
    cache_struct,
)
from common.engine.paged_batch import BatchRow

_HEAD_DIM_STEP = 16


class ModuleKernels:
    """The engine that all replaced modules of one model share."""

    def __init__(self, library: NativeLibrary) -> None:
        self._library = library
        self.engine = NativeEngine(library)

    def prepare_thread(self, threads: int) -> None:
        self.engine = NativeEngine(self._library, threads)

    def replace_linears(self, model: torch.nn.Module) -> int:
        """Put ours in the place of every linear module; returns how many. The weights that are packed are dropped."""
        shared = model.get_input_embeddings().weight  # type: ignore[operator]
        found = [(name, module) for name, module in model.named_modules() if type(module) in (torch.nn.Linear, Conv1D)]
        shapes = [cast("torch.Tensor", module.weight).shape for _, module in found]
        memory = WeightMemory(self._library, [(max(shape), min(shape)) for shape in shapes], 4)
        replaced = 0
        for name, module in found:
            weight = cast("torch.Tensor", module.weight)
            rows = weight.detach().T if isinstance(module, Conv1D) else weight.detach()
            if rows.device.type != "cpu" or not _packs(rows):
                continue
            parent = model.get_submodule(name.rpartition(".")[0])
            bias = cast("torch.Tensor | None", module.bias)
            setattr(parent, name.rpartition(".")[2], NativeLinear(self, self._library, rows, bias, memory))
            if weight is not shared:
                cast("torch.nn.Parameter", weight).data = weight.new_empty(0)
            replaced += 1
        return replaced

    def attention(self, cache: KvCacheView, rows: Sequence[BatchRow]) -> "PagedKernel | None":
        """The attention of one batch, its rows in this order; None where the cache is none that the kernels can read."""
        layout = cache.layout
        if cache.data.device.type != "cpu" or layout.dtype not in ("float32", "bfloat16") or layout.head_dim % _HEAD_DIM_STEP:
            return None
        return PagedKernel(self.engine, cache, rows)


class NativeLinear(torch.nn.Module):
    """A linear module with packed weights `[outputs, inputs]`. It takes and gives the dtype that the one before did."""

    def __init__(
        self, kernels: ModuleKernels, library: NativeLibrary, weights: torch.Tensor, bias: torch.Tensor | None, memory: WeightMemory
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = (int(size) for size in weights.shape)
        self._kernels = kernels
        self._packed = PackedMatrix(library, _array(weights), memory)
        self._bias = None if bias is None else bias.detach().float().contiguous()
        self.register_buffer("weight", weights.new_empty(0), persistent=False)
        """Nothing is in it: some models ask their linear modules for a dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features).float().contiguous()
        out = torch.empty(len(rows), self.out_features)
        bias = None if self._bias is None else self._bias.data_ptr()
        self._kernels.engine.gemm_at(
            rows.data_ptr(), self.in_features, self._packed, out.data_ptr(), self.out_features, len(rows), bias
        )
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)


class PagedKernel:
    """One batch's attention over the cache, for one layer at a time."""

    def __init__(self, engine: NativeEngine, cache: KvCacheView, rows: Sequence[BatchRow]) -> None:
        self._engine = engine
        self._layout = cache.layout
        self._cache = cache_struct(cache.layout, cache.data.data_ptr())
        self._tables: list[NDArray[np.int32]] = [np.array(row.blocks, dtype=np.int32) for row in rows]
        self._sequences = np.empty(len(rows), dtype=SEQUENCE_DTYPE)
        counts = np.array([len(row.tokens) for row in rows], dtype=np.int64)
        self._sequences["first"], self._sequences["count"] = np.cumsum(counts) - counts, counts
        self._sequences["start"] = [row.start for row in rows]
        self._sequences["table"] = [table.ctypes.data for table in self._tables]

    def attend(
        self, layer: int, query: torch.Tensor, scale: float, window: int | None, softcap: float | None, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """`query` is `[heads, tokens, head_dim]`; returns `[tokens, heads, head_dim]` in its dtype."""
        mine = query.transpose(0, 1).float().contiguous()
        out = torch.empty_like(mine)
        logits = None if sinks is None else sinks.detach().float().contiguous()
        width = mine.shape[1] * mine.shape[2]
        struct = AttentionStruct(
            queries=mine.data_ptr(),
            query_stride=width,
            out=out.data_ptr(),
            out_stride=width,
            heads=mine.shape[1],
            kv_heads=self._layout.kv_heads,
            head_dim=mine.shape[2],
            layer=layer,
            scale=scale,
            softcap=softcap or 0.0,
            window=window or 0,
            sinks=None if logits is None else logits.data_ptr(),
        )
        self._engine.attention(self._cache, struct, self._sequences)
        return out.to(query.dtype)


def _packs(rows: torch.Tensor) -> bool:
    return rows.dtype == torch.float32 or (rows.dtype == torch.bfloat16 and rows.shape[1] % 2 == 0)


def _array(weights: torch.Tensor) -> NDArray[np.float32] | NDArray[np.uint16]:
    rows = weights.contiguous()
    array = rows.view(torch.uint16).numpy() if rows.dtype == torch.bfloat16 else rows.numpy()
    return cast("NDArray[np.float32] | NDArray[np.uint16]", array)
