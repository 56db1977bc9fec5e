"""Parts of `eval-engine` that are plain arithmetic on what was answered."""

import pytest

from common.engine.text_figures import TextScores
from tools.eval_engine_compare import TIE, Proof, agreement, prove
from tools.eval_engine_run import Continuation
from tools.eval_engine_table import EvalReport, WeightsFound, as_text


def answer(*tokens: int, bits: str = "") -> Continuation:
    return Continuation(tokens=tokens, bits=tuple(f"{token}{bits}" for token in tokens))


FIRST = [answer(1, 2, 3, 4), answer(5, 6, 7, 8), answer(9, 9, 9, 9)]


def proof(made: list[Continuation], shortfalls: list[list[float]]) -> Proof:
    return prove("somehow", made, FIRST, shortfalls, seconds=1.0, comparable_bits=True)


def test_a_token_that_is_not_the_references_is_tied_or_wrong() -> None:
    found = proof(FIRST, [[0.0, 0.0, 0.0, 0.0], [0.0, TIE, 0.0, TIE / 2], [0.0, 0.0, TIE * 1.01, TIE]])
    assert (found.answers, found.equal, found.ties, found.wrong) == (3, 1, 1, 1)
    assert found.largest_tie == TIE
    assert proof(FIRST, [[float("nan")], [0.0], [0.0]]).wrong == 1, "what is no number is not equal"


def test_ways_with_equal_tokens_may_differ_in_bits() -> None:
    none = [[0.0]] * 3
    assert (proof(FIRST, none).same_tokens, proof(FIRST, none).same_bits) == (True, True)
    other = [*FIRST[:2], answer(9, 9, 9, 9, bits="x")]
    assert (proof(other, none).same_tokens, proof(other, none).same_bits) == (True, False)
    assert not proof([*FIRST[:2], answer(9, 9, 9, 1)], none).same_tokens


def test_agreement_counts_tokens_before_the_first_difference() -> None:
    found = agreement([FIRST[0], answer(5, 0, 7, 8), answer(9, 9, 9, 0)], FIRST)
    assert (found.answers, found.equal, found.first_difference, found.same_bits) == (3, 1, 2.0, False)
    assert found.equal_tokens_share == pytest.approx((1.0 + 0.25 + 0.75) / 3)
    assert agreement(FIRST, FIRST).first_difference is None


def test_the_report_holds_only_without_wrong_answers() -> None:
    scores = TextScores(tokens=10, perplexity=3.0, reference_perplexity=2.0, divergence=0.5, same_likeliest=0.75)
    right, wrong = proof(FIRST, [[0.0]] * 3), proof(FIRST, [[0.0], [1.0], [TIE]])
    found = WeightsFound(name="int4", scores=scores, agreement=agreement(FIRST, FIRST))
    report = EvalReport(model="m", forward="native", new_tokens=4, prompt_lengths=(5, 9), proofs=(right,), weights=(found,))
    assert report.holds
    text = as_text(report)
    assert "3 of 3" in text
    assert "1.50000" in text
    assert "5.0e-01" in text
    bad = EvalReport(model="m", forward="native", new_tokens=4, prompt_lengths=(5, 9), proofs=(right, wrong), weights=())
    assert not bad.holds
    assert "1 (by 1.0e-03 at most)" in as_text(bad)
