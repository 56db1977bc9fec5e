"""How near answers are to each other and to the reference: figures of `eval-engine`, computed from values alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from tools.eval_engine_run import Continuation

TIE = 1e-3
"""Candidates whose reference logits differ by no more are equally good answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """One way of making all answers, in float32. `ties` of the `answers` differ from transformers' choice only where the two
    logits lie within TIE; `wrong` ones differ otherwise. `largest_tie` is the largest such distance. `same_bits` says whether
    all logits are those of the first way, bit by bit (None where only tokens are known)."""

    way: str
    answers: int
    ties: int
    wrong: int
    largest_tie: float
    same_tokens: bool
    same_bits: bool | None
    seconds: float

    @property
    def equal(self) -> int:
        return self.answers - self.ties - self.wrong


def prove(
    way: str,
    made: Sequence[Continuation],
    first: Sequence[Continuation],
    shortfalls: Sequence[Sequence[float]],
    *,
    seconds: float,
    comparable_bits: bool,
) -> Proof:
    """`shortfalls` are the reference's, place by place, given this way's own answers."""
    worst = [max(each) for each in shortfalls]
    return Proof(
        way=way,
        answers=len(made),
        ties=sum(0.0 < each <= TIE for each in worst),
        wrong=sum(not each <= TIE for each in worst),
        largest_tie=max((each for each in worst if each <= TIE), default=0.0),
        same_tokens=[one.tokens for one in made] == [one.tokens for one in first],
        same_bits=[one.bits for one in made] == [one.bits for one in first] if comparable_bits else None,
        seconds=seconds,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far other weights agree with the float32 answers. `equal_tokens_share` is the mean part of an answer before its first
    difference, `first_difference` the mean place of that among those that differ (None: none does)."""

    answers: int
    equal: int
    equal_tokens_share: float
    first_difference: float | None
    same_bits: bool


def agreement(mine: Sequence[Continuation], theirs: Sequence[Continuation]) -> Agreement:
    pairs = list(zip(mine, theirs, strict=True))
    firsts = [first_difference(one.tokens, other.tokens) for one, other in pairs]
    places = [place for place in firsts if place is not None]
    shares = [1.0 if place is None else place / len(one.tokens) for place, (one, _) in zip(firsts, pairs, strict=True)]
    return Agreement(
        answers=len(pairs),
        equal=firsts.count(None),
        equal_tokens_share=sum(shares) / len(shares),
        first_difference=sum(places) / len(places) if places else None,
        same_bits=all(one.bits == other.bits for one, other in pairs),
    )


def first_difference(mine: Sequence[int], theirs: Sequence[int]) -> int | None:
    return next((place for place, (one, other) in enumerate(zip(mine, theirs, strict=True)) if one != other), None)
