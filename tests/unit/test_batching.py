"""How a step's budget is shared."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.policy.batching import StepLimits, share_budget


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 64))
def test_decode_rows_come_first_and_only_the_last_prompt_served_is_cut(remaining: list[int], budget: int) -> None:
    granted = share_budget(remaining, StepLimits(max_tokens=budget))
    assert len(granted) == len(remaining)
    assert sum(granted) == min(budget, sum(remaining)), "the budget is used up, and kept"
    assert all(0 <= got <= wanted for got, wanted in zip(granted, remaining, strict=True))
    decodes = [got for got, wanted in zip(granted, remaining, strict=True) if wanted == 1]
    assert sum(decodes) == min(budget, len(decodes))
    assert decodes == sorted(decodes, reverse=True), "older ones first"
    prompts = [(got, wanted) for got, wanted in zip(granted, remaining, strict=True) if wanted > 1]
    served = [index for index, (got, _) in enumerate(prompts) if got]
    assert served == list(range(len(served)))
    assert all(got == wanted for got, wanted in prompts[: max(0, len(served) - 1)])


def test_a_long_prompt_leaves_room_for_every_stream() -> None:
    assert share_budget([500, 1, 1, 30], StepLimits(max_tokens=64)) == [62, 1, 1, 0]


def test_limits_are_positive() -> None:
    with pytest.raises(ValueError):
        StepLimits(max_tokens=0)
    with pytest.raises(ValueError):
        StepLimits(max_sequences=0)
