"""Log-probabilities of a chosen token and its best alternatives, at one position."""

import math

import torch

from common.engine.token_mass import MASS_OF_BEST, masses
from common.values.tokens import PositionLogprobs


def position_logprobs(logits: torch.Tensor, token: int, alternatives: int) -> PositionLogprobs:
    """Of one row of float32 logits `[vocabulary]`. Equal values rank by id, lowest first, so that the answer is one."""
    chosen, best = float(logits[token]), float(logits.max())
    rank = 1 + int((logits > chosen).sum()) + int((logits[:token] == chosen).sum())
    whole = int(masses(logits.double() - best).sum())
    return from_logits(best=best, whole=whole, chosen=chosen, rank=rank, top=_best(logits, alternatives))


def from_logits(*, best: float, whole: int, chosen: float, rank: int, top: list[tuple[int, float]]) -> PositionLogprobs:
    """`best` is the row's best logit, `whole` the mass of all its tokens, `chosen` and `top` are logits."""
    offset = best + math.log(whole / MASS_OF_BEST)
    return PositionLogprobs(logprob=chosen - offset, rank=rank, top=tuple((token, value - offset) for token, value in top))


def _best(logits: torch.Tensor, count: int) -> list[tuple[int, float]]:
    """The `count` best (token, logit); tokens that cannot occur at all (masked ones) are left out."""
    if count == 0:
        return []
    least = torch.topk(logits, min(count, len(logits))).values[-1]
    tokens = torch.nonzero(logits >= least).flatten().tolist()
    values = logits[tokens].tolist()
    best = sorted(zip(tokens, values, strict=True), key=lambda pair: (-pair[1], pair[0]))[:count]
    return [(token, value) for token, value in best if math.isfinite(value)]
