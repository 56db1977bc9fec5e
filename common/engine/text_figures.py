"""What scoring a fixed text beside the reference yields. Loads no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScores:
    """Of `tokens` scored ones. `divergence` is the mean Kullback-Leibler divergence from the reference's distribution, in nats;
    `same_likeliest` the share of places with the reference's likeliest token."""

    tokens: int
    perplexity: float
    reference_perplexity: float
    divergence: float
    same_likeliest: float
