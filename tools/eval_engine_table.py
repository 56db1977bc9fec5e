"""The report of `eval-engine`: two tables that read in a terminal and in Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

from common.engine.text_figures import TextScores
from tools.bench_engine_columns import markdown_table
from tools.eval_engine_compare import TIE, Agreement, Proof


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsFound:
    """What one kind of weights says, beside float32's answers and the reference's distributions."""

    name: str
    scores: TextScores
    agreement: Agreement


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    model: str
    forward: str
    new_tokens: int
    prompt_lengths: tuple[int, ...]
    proofs: tuple[Proof, ...]
    weights: tuple[WeightsFound, ...]

    @property
    def holds(self) -> bool:
        """Every way gives transformers' tokens."""
        return not any(proof.wrong for proof in self.proofs)


def as_text(report: EvalReport) -> str:
    lengths = report.prompt_lengths
    heading = (
        f"{report.model}, {report.forward} forward, float32: {len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens, "
        f"{report.new_tokens} greedy tokens each. Equal: every token is the one that transformers chooses after the same tokens; "
        f"tied: where it is not, the two logits lie within {TIE}. Same bits: all logits are the first row's; through two workers, "
        "all log-probabilities are those of one."
    )
    parts = [heading, _proofs(report.proofs)]
    if report.weights:
        scored = report.weights[0].scores.tokens
        parts += [f"Other weights against float32; {scored} tokens of fixed text are scored.", _weights(report.weights)]
    return "\n\n".join(parts)


def _proofs(proofs: Sequence[Proof]) -> str:
    columns = ["made", "equal to transformers", "tied", "wrong", "tokens as the first row", "same bits", "seconds"]
    rows = [
        [
            one.way,
            f"{one.equal} of {one.answers}",
            f"{one.ties}" + (f" (by {one.largest_tie:.1e} at most)" if one.ties else ""),
            str(one.wrong),
            _yes(one.same_tokens),
            "" if one.same_bits is None else _yes(one.same_bits),
            f"{one.seconds:.0f}",
        ]
        for one in proofs
    ]
    return markdown_table(columns, rows)


def _weights(found: Sequence[WeightsFound]) -> str:
    columns = [
        *("weights", "perplexity", "to reference", "KL, nats", "same likeliest token"),
        *("equal answers", "equal tokens before", "first difference at", "bits of float32"),
    ]
    rows = [
        [
            one.name,
            f"{one.scores.perplexity:.4f}",
            f"{one.scores.perplexity / one.scores.reference_perplexity:.5f}",
            f"{max(0.0, one.scores.divergence):.1e}",
            f"{one.scores.same_likeliest:.2%}",
            f"{one.agreement.equal} of {one.agreement.answers}",
            f"{one.agreement.equal_tokens_share:.1%}",
            "" if one.agreement.first_difference is None else f"{one.agreement.first_difference:.1f}",
            _yes(one.agreement.same_bits),
        ]
        for one in found
    ]
    return markdown_table(columns, rows)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
