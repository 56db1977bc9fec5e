"""The forward of the Llama family: a step's metadata laid out by numpy, then one call for all layers."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from common.engine.block_table import BlockTable
from common.engine.kv_cache_view import KvCacheView
from common.engine.native.library import SEQUENCE_DTYPE, BatchStruct, NativeEngine, NativeLibrary
from common.engine.native.llama_model import LlamaModel
from common.engine.paged_batch import BatchRow, fresh_blocks


class NativeForward:
    """A ModelForward. A row's logits have the same bits whatever else is in the batch, and however its positions came."""

    def __init__(self, library: NativeLibrary, model: LlamaModel) -> None:
        self._library = library
        self._model = model
        self._engine = NativeEngine(library)
        self.vocab_size = model.vocab_size

    def prepare_thread(self, threads: int) -> None:
        """The helpers are started here, by the thread that computes: they have its priority and its cores."""
        self._engine = NativeEngine(self._library, threads)

    def logits(self, cache: KvCacheView, rows: Sequence[BatchRow]) -> torch.Tensor:
        """Float32 `[kept positions, vocabulary]`, in the order of the rows."""
        cache.clear([block for row in rows for block in fresh_blocks(row, cache.layout.block_size)])
        model = self._model
        model.rotary.cover(max(row.end for row in rows))
        counts = np.fromiter((len(row.tokens) for row in rows), dtype=np.int64, count=len(rows))
        firsts = np.cumsum(counts) - counts
        starts = np.fromiter((row.start for row in rows), dtype=np.int64, count=len(rows))
        tokens = int(counts.sum())
        ids = np.fromiter(chain.from_iterable(row.tokens for row in rows), dtype=np.int32, count=tokens)
        owners = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
        positions = (np.arange(tokens) + np.repeat(starts - firsts, counts)).astype(np.int32)
        tables = [row.table if row.table is not None else BlockTable(row.blocks) for row in rows]
        sequences = np.empty(len(rows), dtype=SEQUENCE_DTYPE)
        sequences["first"], sequences["start"], sequences["count"] = firsts, starts, counts
        sequences["table"] = [table.address for table in tables]
        kept = [int(first) + place for first, row in zip(firsts, rows, strict=True) for place in row.kept]
        keep = np.array(kept, dtype=np.int32)
        logits = torch.empty(len(kept), model.logits_size)
        batch = BatchStruct(
            tokens=tokens,
            sequences=len(rows),
            kept=len(kept),
            cache_bf16=int(cache.layout.dtype == "bfloat16"),
            block_size=cache.layout.block_size,
            ids=ids.ctypes.data,
            positions=positions.ctypes.data,
            owners=owners.ctypes.data,
            sequence=sequences.ctypes.data,
            keep=keep.ctypes.data,
            cosine=model.rotary.cosine.ctypes.data,
            sine=model.rotary.sine.ctypes.data,
            cache=cache.data.data_ptr(),
            logits=logits.data_ptr(),
        )
        self._engine.step(model.struct, batch)
        return logits
