"""Drawing in torch, on any device: the definition of what the kernels draw.

Greedy rows cost an argmax. Others look at the best CANDIDATES tokens only, which nearly always suffice, then at MORE_CANDIDATES,
and sort the whole row where these cannot tell either (see truncation.py).
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from common.engine.draw_row import inverse_temperature
from common.engine.draws import uniform
from common.engine.logit_adjustments import adjust, adjusts
from common.engine.logprobs import position_logprobs
from common.engine.sampler import ALL_MASKED, NOT_FINITE, Drawn
from common.engine.sequence_state import SequenceState
from common.engine.token_mass import masses
from common.engine.truncation import Truncation, choose
from common.values.errors import InvariantBroken
from common.values.tokens import PositionLogprobs

CANDIDATES = 256
MORE_CANDIDATES = 4096


class TorchSampler:
    """A Sampler. It looks at `candidates` tokens first."""

    def __init__(self, candidates: int = CANDIDATES) -> None:
        self._candidates = candidates

    def prepare_thread(self, threads: int) -> None:
        """Its threads are torch's own."""

    def draw(self, logits: torch.Tensor, states: Sequence[SequenceState]) -> list[Drawn]:
        finite = torch.isfinite(logits).all(dim=-1).tolist()
        for row, state in zip(logits, states, strict=True):
            if adjusts(state):
                adjust(row, state)
        best, tokens = (column.tolist() for column in torch.max(logits, dim=-1))
        faults = [_fault(good, value) for good, value in zip(finite, best, strict=True)]
        warm = [i for i, state in enumerate(states) if faults[i] is None and not state.sampling.greedy]
        for i, token in zip(warm, self._draw_warm(logits, warm, states), strict=True):
            tokens[i] = token
        return [_drawn(logits[i], state, tokens[i], faults[i]) for i, state in enumerate(states)]

    def score(self, logits: torch.Tensor, tokens: Sequence[int], alternatives: int) -> list[PositionLogprobs] | None:
        if not bool(torch.isfinite(logits).all()):
            return None
        return [position_logprobs(row, token, alternatives) for row, token in zip(logits, tokens, strict=True)]

    def _draw_warm(self, logits: torch.Tensor, rows: list[int], states: Sequence[SequenceState]) -> list[int]:
        if not rows:
            return []
        own = logits if len(rows) == len(logits) else logits[rows]
        values, tokens = _in_order(*torch.topk(own, min(self._candidates, own.shape[-1])))
        return [_draw_row(own[i], states[row], values[i], tokens[i]) for i, row in enumerate(rows)]


def _fault(finite: bool, best: float) -> str | None:
    if not finite:
        return NOT_FINITE
    return ALL_MASKED if best == float("-inf") else None


def _drawn(logits: torch.Tensor, state: SequenceState, token: int, fault: str | None) -> Drawn:
    if fault is not None:
        return Drawn(fault=fault)
    alternatives = state.sampling.logprobs
    return Drawn(token=token, logprobs=None if alternatives is None else position_logprobs(logits, token, alternatives))


def _draw_row(row: torch.Tensor, state: SequenceState, values: torch.Tensor, tokens: NDArray[np.int64]) -> int:
    sampling = state.sampling
    vocabulary = row.shape[-1]
    truncation = Truncation(
        top_k=sampling.top_k if 0 < sampling.top_k < vocabulary else None, top_p=sampling.top_p, min_p=sampling.min_p
    )
    number = uniform(seed=sampling.seed, choice=state.choice, position=state.new_tokens)
    best, inverse = float(values[0]), inverse_temperature(sampling)
    total = int(masses(_scaled(row, best, inverse)).sum()) if truncation.needs_total else 0
    for count in (len(values), MORE_CANDIDATES, vocabulary):
        if count > len(values):
            values, tokens = _best(row, min(count, vocabulary))
        scaled = _scaled(values, best, inverse)
        complete = len(values) == vocabulary
        index = choose(scaled.numpy(), masses(scaled).numpy(), truncation, uniform=number, total=total, complete=complete)
        if index is not None:
            return int(tokens[index])
    raise InvariantBroken("a token must be found among all tokens")


def _scaled(values: torch.Tensor, best: float, inverse: float) -> torch.Tensor:
    return (values.double() - best) * inverse


def _best(row: torch.Tensor, count: int) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """The `count` best tokens of one row, in order; all of them by a stable sort, which keeps equal values ascending by id."""
    if count < row.shape[-1]:
        return _in_order(*torch.topk(row, count))
    values, tokens = torch.sort(row, descending=True, stable=True)
    return values.cpu(), tokens.cpu().numpy()


def _in_order(values: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """Descending by value, equal values ascending by id."""
    found, ids = values.cpu().numpy(), tokens.cpu().numpy()
    order = np.lexsort((ids, -found), axis=-1)
    return torch.from_numpy(np.take_along_axis(found, order, -1)), np.take_along_axis(ids, order, -1)
