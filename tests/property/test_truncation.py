"""The choice among candidates equals a plain reference over the whole vocabulary, or admits that it cannot tell."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.engine.token_mass import masses
from common.engine.truncation import Floats, Integers, Truncation, choose


def masses_of(scaled: Floats) -> Integers:
    found: Integers = masses(torch.from_numpy(scaled)).numpy()
    return found


def kept_by_definition(logits: list[float], temperature: float, truncation: Truncation) -> list[tuple[int, float]]:
    """(token, probability) of what is left, straight from the definitions; probabilities sum to one."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    best = max(logits)
    weights = {token: math.exp((logits[token] - best) / temperature) for token in order}
    if truncation.top_k is not None:
        order = order[: truncation.top_k]
    whole = math.fsum(weights[token] for token in order)
    kept, before = [], 0.0
    for token in order:
        if before >= truncation.top_p and truncation.top_p < 1.0:
            break
        kept.append(token)
        before += weights[token] / whole
    kept = [token for token in kept if weights[token] >= truncation.min_p]
    left = math.fsum(weights[token] for token in kept)
    return [(token, weights[token] / left) for token in kept]


logit_rows = st.lists(st.integers(-60, 60).map(lambda n: n / 8), min_size=2, max_size=60)
truncations = st.builds(
    Truncation,
    top_k=st.none() | st.integers(1, 70),
    top_p=st.just(1.0) | st.floats(0.013, 0.987),
    min_p=st.just(0.0) | st.floats(0.0123, 0.9876),
)


@settings(max_examples=400, deadline=None)
@given(
    logits=logit_rows,
    truncation=truncations,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.9]),
    uniform=st.floats(0.0, 1.0, exclude_max=True),
    shown=st.integers(1, 60),
)
def test_choice_is_the_reference_and_few_candidates_never_differ(
    logits: list[float], truncation: Truncation, temperature: float, uniform: float, shown: int
) -> None:
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    scaled = (np.array([logits[token] for token in order]) - max(logits)) / temperature
    weights = masses_of(scaled)
    total = int(weights.sum())
    index = choose(scaled, weights, truncation, uniform=uniform, total=total, complete=True)
    assert index is not None
    reference = kept_by_definition(logits, temperature, truncation)
    below = 0.0
    for token, probability in reference:
        if token == order[index]:
            assert below - 1e-9 <= uniform <= below + probability + 1e-9
            break
        below += probability
    else:
        raise AssertionError("a token was drawn that truncation takes away")
    part = choose(scaled[:shown], weights[:shown], truncation, uniform=uniform, total=total, complete=shown >= len(scaled))
    assert part in (None, index)


def test_few_candidates_suffice_where_the_distribution_is_peaked() -> None:
    scaled = -np.arange(1000.0)
    weights = masses_of(scaled)
    total = int(weights.sum())
    for truncation in (Truncation(), Truncation(top_k=50), Truncation(top_p=0.9), Truncation(min_p=0.05)):
        short = choose(scaled[:256], weights[:256], truncation, uniform=0.73, total=total, complete=False)
        assert short == choose(scaled, weights, truncation, uniform=0.73, total=total, complete=True) == 1


def test_ties_at_the_edge_of_the_candidates_are_not_guessed() -> None:
    flat = np.zeros(256)
    weights = masses_of(flat)
    total = 1000 * int(weights[0])
    assert choose(flat, weights, Truncation(), uniform=0.0, total=total, complete=False) is None
    assert choose(flat, weights, Truncation(top_k=10), uniform=0.0, total=total, complete=False) is None
