"""One pass of a model over rows of a paged batch: what an executor needs of a model, and transformers' modules behind it.

The Llama family's own forward, on native kernels, is `common.engine.native.native_forward`.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from common.engine.kv_cache_view import KvCacheView
from common.engine.paged_batch import AttentionKernel, BatchRow, PagedBatch, paged_batch
from common.values.errors import ModelError


class ModelForward(Protocol):
    """Used by one thread only."""

    @property
    def vocab_size(self) -> int:
        """How many tokens the model can take in."""
        ...

    def prepare_thread(self, threads: int) -> None:
        """Called in the thread that will compute, before the first step: `threads` compute threads may be used."""
        ...

    def logits(self, cache: KvCacheView, rows: Sequence[BatchRow]) -> torch.Tensor:
        """Float32 `[kept positions, vocabulary]` in the order of the rows, which the caller may change. Keys and values of
        all positions are in the cache afterwards."""
        ...


class Kernels(Protocol):
    """Own kernels inside transformers' modules; see `common.engine.native.linear_modules`."""

    def prepare_thread(self, threads: int) -> None:
        """As ModelForward's."""
        ...

    def attention(self, cache: KvCacheView, rows: Sequence[BatchRow]) -> AttentionKernel | None:
        """The attention of one batch; None where torch's is to be used."""
        ...


class TransformersForward:
    """A ModelForward. The model must have been loaded with, or set to, PAGED_ATTENTION."""

    def __init__(self, model: torch.nn.Module, kernels: Kernels | None = None) -> None:
        self._model = model
        self._kernels = kernels
        self.vocab_size = _vocab_size(model)

    def prepare_thread(self, threads: int) -> None:
        torch.set_num_threads(threads)
        if self._kernels is not None:
            self._kernels.prepare_thread(threads)

    def logits(self, cache: KvCacheView, rows: Sequence[BatchRow]) -> torch.Tensor:
        kernel = None if self._kernels is None else self._kernels.attention(cache, rows)
        return forward(self._model, paged_batch(cache, rows, kernel))


def forward(model: torch.nn.Module, batch: PagedBatch) -> torch.Tensor:
    """Float32 logits `[kept positions, vocabulary]`. Keys and values of all positions are in the cache afterwards."""
    batch.cache.clear(list(batch.fresh_blocks))
    output = model(
        input_ids=batch.tokens[None],
        position_ids=batch.positions[None],
        attention_mask=None,
        use_cache=False,
        logits_to_keep=batch.kept,
        paged_batch=batch,
    )
    logits = output.logits[0]
    assert isinstance(logits, torch.Tensor)
    return logits.float()


def _vocab_size(model: torch.nn.Module) -> int:
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    size = getattr(embeddings, "num_embeddings", None)
    if not isinstance(size, int):
        raise ModelError(f"{type(model).__name__} has no table of input embeddings")
    return size
