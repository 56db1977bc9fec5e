"""Log-probabilities of a chosen token and its best alternatives, at one position."""

import math

import torch

from common.values.tokens import PositionLogprobs


def position_logprobs(logits: torch.Tensor, token: int, alternatives: int) -> PositionLogprobs:
    """Of one row of float32 logits `[vocabulary]`. Equal values rank by id, lowest first, so that the answer is one."""
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs[token]
    rank = 1 + int((logprobs > chosen).sum()) + int((logprobs[:token] == chosen).sum())
    return PositionLogprobs(logprob=float(chosen), rank=rank, top=_best(logprobs, alternatives))


def _best(logprobs: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` best (token, logprob); tokens that cannot occur at all (masked ones) are left out."""
    if count == 0:
        return ()
    least = torch.topk(logprobs, min(count, len(logprobs))).values[-1]
    tokens = torch.nonzero(logprobs >= least).flatten().tolist()
    values = logprobs[tokens].tolist()
    best = sorted(zip(tokens, values, strict=True), key=lambda pair: (-pair[1], pair[0]))[:count]
    return tuple((token, value) for token, value in best if math.isfinite(value))
