"""Draws the next token of each row. A row's token depends on its own logits, parameters, seed, choice and position alone.

Greedy rows cost an argmax. Others look at the best CANDIDATES tokens only, which nearly always suffice, then at MORE_CANDIDATES,
and sort the whole row where these cannot tell either (see truncation.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from common.engine.draws import uniform
from common.engine.logit_adjustments import adjust, adjusts
from common.engine.logprobs import position_logprobs
from common.engine.sequence_state import SequenceState
from common.engine.truncation import Floats, Truncation, choose
from common.values.errors import InvariantBroken
from common.values.tokens import PositionLogprobs

CANDIDATES = 256
MORE_CANDIDATES = 4096
LEAST_TEMPERATURE = 1e-5
"""Temperatures between 0 and this are taken as this: below it float32 has nothing left to divide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A token, or why none can be drawn from this row."""

    token: int = 0
    logprobs: PositionLogprobs | None = None
    fault: str | None = None


def draw(logits: torch.Tensor, states: Sequence[SequenceState]) -> list[Drawn]:
    """One row of float32 `logits` `[rows, vocabulary]` for each state. Changes `logits`, leaves the states as they are."""
    broken = ~torch.isfinite(logits.sum(dim=-1))
    for row, state in zip(logits, states, strict=True):
        if adjusts(state):
            adjust(row, state)
    best, tokens = (column.tolist() for column in torch.max(logits, dim=-1))
    faults = [_fault(bad, value) for bad, value in zip(broken.tolist(), best, strict=True)]
    warm = [i for i, state in enumerate(states) if faults[i] is None and not state.sampling.greedy]
    for i, token in zip(warm, _draw_warm(logits, warm, states), strict=True):
        tokens[i] = token
    return [_drawn(logits[i], state, tokens[i], faults[i]) for i, state in enumerate(states)]


def _fault(broken: bool, best: float) -> str | None:
    if broken:
        return "the model's logits are not finite"
    return "no token is left to draw: all are masked" if best == float("-inf") else None


def _drawn(logits: torch.Tensor, state: SequenceState, token: int, fault: str | None) -> Drawn:
    if fault is not None:
        return Drawn(fault=fault)
    alternatives = state.sampling.logprobs
    return Drawn(token=token, logprobs=None if alternatives is None else position_logprobs(logits, token, alternatives))


def _draw_warm(logits: torch.Tensor, rows: list[int], states: Sequence[SequenceState]) -> list[int]:
    if not rows:
        return []
    own = logits if len(rows) == len(logits) else logits[rows]
    values, tokens = torch.topk(own, min(CANDIDATES, own.shape[-1]))
    candidates, ids = _in_order(values.double().cpu().numpy(), tokens.cpu().numpy())
    return [_draw_row(own[i], states[row], candidates[i], ids[i]) for i, row in enumerate(rows)]


def _in_order(values: Floats, tokens: NDArray[np.int64]) -> tuple[Floats, NDArray[np.int64]]:
    """Descending by value, equal values ascending by id."""
    order = np.lexsort((tokens, -values), axis=-1)
    return np.take_along_axis(values, order, -1), np.take_along_axis(tokens, order, -1)


def _draw_row(row: torch.Tensor, state: SequenceState, candidates: Floats, ids: NDArray[np.int64]) -> int:
    sampling = state.sampling
    vocabulary = row.shape[-1]
    temperature = max(sampling.temperature, LEAST_TEMPERATURE)
    truncation = Truncation(
        top_k=sampling.top_k if 0 < sampling.top_k < vocabulary else None, top_p=sampling.top_p, min_p=sampling.min_p
    )
    number = uniform(seed=sampling.seed, choice=state.choice, position=state.new_tokens)
    best = float(candidates[0])
    total = _total(row, best, temperature) if truncation.needs_total else 0.0
    for count in (len(candidates), MORE_CANDIDATES, vocabulary):
        if count > len(candidates):
            candidates, ids = _best(row, min(count, vocabulary))
        scaled = (candidates - best) / temperature
        index = choose(scaled, truncation, uniform=number, total=total, complete=len(candidates) == vocabulary)
        if index is not None:
            return int(ids[index])
    raise InvariantBroken("a token must be found among all tokens")


def _best(row: torch.Tensor, count: int) -> tuple[Floats, NDArray[np.int64]]:
    """The `count` best tokens of one row, in order; all of them by a stable sort, which keeps equal values ascending by id."""
    if count < row.shape[-1]:
        values, tokens = torch.topk(row, count)
        return _in_order(values.double().cpu().numpy(), tokens.cpu().numpy())
    values, tokens = torch.sort(row, descending=True, stable=True)
    return values.double().cpu().numpy(), tokens.cpu().numpy()


def _total(row: torch.Tensor, best: float, temperature: float) -> float:
    """Row by row on purpose: summed over a batch at once, the last bits could depend on how many rows there are."""
    return float(row.sub(best).div_(temperature).exp_().sum(dtype=torch.float64))
