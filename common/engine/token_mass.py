"""A token's mass: e^((logit - best) / temperature) as an integer, MASS_OF_BEST for the best token.

Integers add up to the same sum in any order: a total does not depend on how many rows are drawn together, on threads, on vectors
or on the device. The products and sums below are those of native/token_mass.h, one by one and never fused, so that kernels and
torch give the same integers.
"""

import torch

MASS_BITS = 42
MASS_OF_BEST = 2**MASS_BITS
"""2**20 tokens of the best's mass fit into 62 bits. What is less than 1e-13 of the best is never drawn."""
_LEAST_SCALED = -32.0
"""e^-32 rounds to 0."""
_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_EXPONENT = 2.0**52 + 1023 + MASS_BITS
"""What is added to it is rounded to an integer."""


def masses(scaled: torch.Tensor) -> torch.Tensor:
    """Int64, of float64 `scaled` = (logit - best) / temperature, none above 0.

    Taylor's polynomial of degree 9 on half of ln 2 to each side: the error is below 1e-11 of the mass.
    """
    bounded = scaled.clamp(min=_LEAST_SCALED)
    n = (bounded * _LOG2_E + _EXPONENT) - _EXPONENT
    r = (bounded - n * _LN2_HIGH) - n * _LN2_LOW
    r2 = r * r
    r4 = r2 * r2
    low = (1.0 + r) + r2 * (0.5 + r * (1 / 6))
    middle = (1 / 24 + r * (1 / 120)) + r2 * (1 / 720 + r * (1 / 5040))
    high = 1 / 40320 + r * (1 / 362880)
    y = (low + r4 * middle) + (r4 * r4) * high
    powers = torch.tensor([2.0 ** (MASS_BITS - i) for i in range(48)], dtype=torch.float64, device=scaled.device)
    return torch.round(y * powers[(-n).long()]).long()
