"""A forward whose logits can be told apart: for showing that two ways of computing a token give the same bits."""

import hashlib
from collections.abc import Mapping, Sequence

import torch

from common.engine.forward import ModelForward
from common.engine.kv_cache_view import KvCacheView
from common.engine.native.choose_forward import choose_forward
from common.engine.native.library import NativeLibrary
from common.engine.paged_batch import BatchRow
from common.engine.quantization_choice import Quantization
from common.engine.quantized_file import StoredMatrix
from common.engine.torch_step import TorchExecutor
from common.ports.kv_transport import KvRegion
from common.values.kv_layout import KvLayout


class WatchedForward:
    """A ModelForward. `take` gives a digest of each row of logits since the last call, in the order of the rows."""

    def __init__(self, forward: ModelForward) -> None:
        self._forward = forward
        self._digests: list[bytes] = []
        self.vocab_size = forward.vocab_size

    def prepare_thread(self, threads: int) -> None:
        self._forward.prepare_thread(threads)

    def logits(self, cache: KvCacheView, rows: Sequence[BatchRow]) -> torch.Tensor:
        logits = self._forward.logits(cache, rows)
        self._digests += [hashlib.blake2b(row.numpy(), digest_size=16).digest() for row in logits.cpu().contiguous()]
        return logits

    def unwatched_logits(self, cache: KvCacheView, rows: Sequence[BatchRow]) -> torch.Tensor:
        return self._forward.logits(cache, rows)

    def take(self) -> list[bytes]:
        digests, self._digests = self._digests, []
        return digests


class WatchedModel:
    """A model loaded as a worker loads it, its executor over a region, and its forward beside it."""

    def __init__(
        self,
        model: torch.nn.Module,
        layout: KvLayout,
        region: KvRegion,
        *,
        library: NativeLibrary | None,
        quantization: Quantization,
        stored: Mapping[str, StoredMatrix],
    ) -> None:
        chosen = choose_forward(
            model, layout, device="cpu", check=False, max_model_len=None, library=library, quantization=quantization, stored=stored
        )
        self.forward = WatchedForward(chosen)
        self.cache = KvCacheView.over_region(layout=layout, address=region.blocks_address, blocks=region.blocks, device="cpu")
        self.executor = TorchExecutor(self.forward, self.cache)
