"""How near one forward's answers are to the reference's: figures of `eval-engine`, computed from values alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from common.values.tokens import PositionLogprobs
from tools.eval_engine_material import Material
from tools.eval_engine_run import Answers, Continuation

TIE = 1e-3
"""Natural log. Candidates whose reference log-probabilities differ by no more are equally good answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """`ties` first differ at a tie and are not among `equal`. `equal_tokens_share` is the mean part of a continuation before
    the first difference; `scored` is the number of scored tokens of the text."""

    name: str
    scored: int
    perplexity: float
    perplexity_ratio: float
    same_likeliest: float
    continuations: int
    equal: int
    ties: int
    equal_tokens_share: float


def compare(name: str, answers: Answers, reference: Answers, material: Material) -> Agreement:
    pairs = list(zip(answers.continuations, reference.continuations, strict=True))
    firsts = [first_difference(mine.tokens, theirs.tokens) for mine, theirs in pairs]
    ties = [first is not None and is_tie(mine, theirs, first) for (mine, theirs), first in zip(pairs, firsts, strict=True)]
    shares = [1.0 if first is None else first / len(theirs.tokens) for (_, theirs), first in zip(pairs, firsts, strict=True)]
    same = [_likeliest(mine) == _likeliest(theirs) for mine, theirs in zip(answers.scores, reference.scores, strict=True)]
    return Agreement(
        name=name,
        scored=len(material.text) - 1,
        perplexity=perplexity(answers.scores),
        perplexity_ratio=perplexity(answers.scores) / perplexity(reference.scores),
        same_likeliest=sum(same) / len(same),
        continuations=len(pairs),
        equal=firsts.count(None),
        ties=sum(ties),
        equal_tokens_share=sum(shares) / len(shares),
    )


def perplexity(scores: Sequence[PositionLogprobs]) -> float:
    return math.exp(-sum(score.logprob for score in scores) / len(scores))


def first_difference(mine: Sequence[int], theirs: Sequence[int]) -> int | None:
    return next((place for place, (one, other) in enumerate(zip(mine, theirs, strict=True)) if one != other), None)


def is_tie(mine: Continuation, reference: Continuation, place: int) -> bool:
    """Whether the token that was chosen instead is as good as the reference's, by the reference's own log-probabilities."""
    known = dict(reference.tops[place])
    ours, theirs = known.get(mine.tokens[place]), known.get(reference.tokens[place])
    return ours is not None and theirs is not None and abs(theirs - ours) <= TIE


def _likeliest(score: PositionLogprobs) -> int:
    return score.top[0][0]
