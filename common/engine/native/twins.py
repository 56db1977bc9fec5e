"""What each kernel computes, in plain torch: the definition that the tests hold the kernels to."""

import math
from collections.abc import Sequence

import torch


def gemm(x: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x [M, K]`, `weights [N, K]`; float64 inside, so that what differs is the kernel's rounding."""
    product = x.double() @ weights.double().T
    return (product if bias is None else product + bias.double()).float()


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Root-mean-square norm of each row."""
    wide = x.double()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon) * weight.double()).float()


def rotate(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """`heads [n, 2h]`, `cosine` and `sine [n, h]`."""
    left, right = heads.chunk(2, dim=-1)
    return torch.cat([left * cosine - right * sine, right * cosine + left * sine], dim=-1)


def gate(x: torch.Tensor) -> torch.Tensor:
    """`x [n, 2m]` holds the gate, then what it lets through."""
    gates, values = x.double().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gates) * values).float()


def attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One sequence: `query [count, heads, d]` at positions `start ..`, `keys` and `values [positions, kv_heads, d]`."""
    count, heads, _ = query.shape
    group = heads // keys.shape[1]
    wide_keys, wide_values = (part.double().repeat_interleave(group, dim=1) for part in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.double(), wide_keys) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    at, of = torch.arange(start, start + count)[:, None], torch.arange(len(keys))[None]
    hidden = (of > at) if window is None else (of > at) | (of <= at - window)
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(heads, count, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : len(keys)]
    return torch.einsum("hqk,khd->qhd", weights, wide_values).float()


def gather(cache: torch.Tensor, layer: int, table: Sequence[int], positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[positions, kv_heads, d]` of one sequence from `[blocks, layers, 2, kv_heads, block_size, d]`."""
    pair = cache[list(table), layer].permute(1, 0, 3, 2, 4).flatten(1, 2)
    return pair[0, :positions], pair[1, :positions]
