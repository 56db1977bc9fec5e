"""Attention over the paged KV cache, plugged into transformers' own modules.

transformers hands over queries, keys and values with rotary embedding applied and KV heads not repeated; this function
writes the new keys and values into the cache and attends over what the cache holds. It honours grouped queries, scaling,
sliding windows, soft-capping (Gemma 2) and attention sinks (`s_aux`, gpt-oss).
"""

import torch
from torch.nn import functional
from transformers import AttentionInterface

from common.engine.paged_batch import Chunk, DecodeGroup, PagedBatch

PAGED_ATTENTION = "segue_paged"
"""The name to load a model with (`attn_implementation`)."""
QUERY_SLICE = 256
"""Queries of a chunk that are attended at once where a mask is needed; bounds the mask's memory."""


def register_paged_attention() -> None:
    """Make PAGED_ATTENTION known to transformers. Idempotent. No mask function is registered, so none is ever built."""
    AttentionInterface.register(PAGED_ATTENTION, paged_attention)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged_batch: PagedBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_unused: object,
) -> tuple[torch.Tensor, None]:
    """`query` is `[1, heads, tokens, head_dim]`, `key` and `value` `[1, kv_heads, tokens, head_dim]`; returns
    `[1, tokens, heads, head_dim]` and no weights."""
    layer = module.layer_idx
    assert isinstance(layer, int)
    paged_batch.called.append(layer)
    cache = paged_batch.cache
    cache.write(layer, paged_batch.write, key[0], value[0])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if paged_batch.kernel is not None:
        return paged_batch.kernel.attend(layer, query[0], scale, sliding_window, softcap, s_aux)[None], None
    attend = _Attend(scale, softcap or None, s_aux, sliding_window or None)
    tokens = query.shape[2]
    out = query.new_empty(tokens, query.shape[1], query.shape[3])
    grouped = query[0].reshape(key.shape[1], -1, tokens, query.shape[3])
    for group in paged_batch.groups:
        keys, values = cache.gather(layer, group.gather, group.rows)
        out[group.first : group.first + group.rows] = attend.group(grouped, keys, values, group)
    for chunk in paged_batch.chunks:
        own = slice(chunk.first, chunk.first + chunk.count)
        if chunk.gather is None:
            keys, values = key[:, :, own], value[:, :, own]
        else:
            keys, values = cache.gather(layer, chunk.gather, 1)
        out[own] = attend.chunk(grouped[:, :, own], keys, values, chunk)
    return out[None], None


class _Attend:
    """One layer's attention settings. Queries come as `[kv_heads, queries a head, tokens, head_dim]`."""

    def __init__(self, scale: float, softcap: float | None, sinks: torch.Tensor | None, window: int | None) -> None:
        self._scale = scale
        self._softcap = softcap
        self._sinks = sinks
        self._window = window

    def group(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: DecodeGroup) -> torch.Tensor:
        """Rows of one position: the queries of one KV head take the place of the tokens. `[rows, heads, head_dim]`."""
        mask = group.masks.get(self._window)
        if mask is None:
            mask = _mask(group.positions[:, None], 0, group.length, self._window, query.dtype)[:, None]
            group.masks[self._window] = mask
        mine = query[:, :, group.first : group.first + group.rows].permute(2, 0, 1, 3)
        sinks = None if self._sinks is None else self._sinks.view(1, query.shape[0], query.shape[1], 1)
        return self._attention(mine, keys, values, mask, sinks).flatten(1, 2)

    def chunk(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """`[tokens, heads, head_dim]`. The queries of one KV head take the place of a batch: nothing is repeated."""
        by_turn = query.transpose(0, 1)
        sinks = None if self._sinks is None else self._sinks.view(query.shape[0], query.shape[1], 1, 1).transpose(0, 1)
        plain = self._softcap is None and sinks is None
        if chunk.start == 0 and plain and (self._window is None or chunk.count <= self._window):
            out = functional.scaled_dot_product_attention(
                by_turn, _spread(keys, by_turn), _spread(values, by_turn), is_causal=True, scale=self._scale
            )
            return out.permute(2, 1, 0, 3).flatten(1, 2)
        parts = []
        for begin in range(0, chunk.count, QUERY_SLICE):
            end = min(begin + QUERY_SLICE, chunk.count)
            low = 0 if self._window is None else max(0, chunk.start + begin - self._window + 1)
            high = chunk.start + end
            positions = torch.arange(chunk.start + begin, high, device=query.device)
            mask = _mask(positions, low, high, self._window, query.dtype)
            seen = slice(low, high)
            part = by_turn[:, :, begin:end]
            out = self._attention(part, _spread(keys[:, :, seen], part), _spread(values[:, :, seen], part), mask, sinks)
            parts.append(out.permute(2, 1, 0, 3).flatten(1, 2))
        return torch.cat(parts)

    def _attention(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        if self._softcap is None and sinks is None:
            return functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self._scale)
        scores = torch.matmul(query, keys.transpose(-1, -2)) * self._scale
        if self._softcap is not None:
            scores = torch.tanh(scores / self._softcap) * self._softcap
        scores = scores + mask
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        return torch.matmul(weights[..., : keys.shape[-2]], values)


def _spread(kv: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """One sequence's K or V under each of the turns of its queries, without a copy."""
    return kv.expand(query.shape[0], -1, -1, -1)


def _mask(positions: torch.Tensor, low: int, high: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """`[*positions.shape, high - low]`: 0 where a query at its position sees the key's position, else -inf."""
    keys = torch.arange(low, high, device=positions.device)
    hidden = keys > positions[..., None]
    if window is not None:
        hidden |= keys <= positions[..., None] - window
    return torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, float("-inf"))
