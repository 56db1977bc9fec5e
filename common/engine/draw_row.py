"""What drawing needs of a sequence, laid out as the kernels read it (`DrawRow` of native/draw.h), and kept as it grows."""

import math
from ctypes import Structure, c_double, c_float, c_int64, c_uint64, c_void_p

import numpy as np
from numpy.typing import NDArray

from common.values.sampling import SamplingParameters

LEAST_TEMPERATURE = 1e-5
"""Temperatures between 0 and this are taken as this: below it float32 has nothing left to divide."""


class DrawRow(Structure):
    """Addresses are 0 where there is nothing."""

    _fields_ = (
        *((name, c_uint64) for name in ("seed", "choice", "position")),
        *((name, c_double) for name in ("inverse_temperature", "top_p", "least_scaled")),
        *((name, c_int64) for name in ("top_k", "alternatives", "min_tokens", "bias_count", "counted", "masked_count")),
        *((name, c_void_p) for name in ("bias_tokens", "bias_values", "counted_tokens", "output_counts", "masked", "allowed")),
        *((name, c_float) for name in ("repetition", "presence", "frequency")),
    )

    position: int
    counted: int
    counted_tokens: int
    output_counts: int
    allowed: int | None


class DrawArrays:
    """The row of one sequence, and the arrays that it points to, which never change."""

    def __init__(self, sampling: SamplingParameters, *, choice: int, masked_tokens: tuple[int, ...]) -> None:
        self._bias_tokens: NDArray[np.int64] = np.array(list(sampling.logit_bias), dtype=np.int64)
        self._bias_values: NDArray[np.float32] = np.array(list(sampling.logit_bias.values()), dtype=np.float32)
        self._masked: NDArray[np.int64] = np.array(masked_tokens, dtype=np.int64)
        self.row = DrawRow(
            seed=sampling.seed,
            choice=choice,
            inverse_temperature=0.0 if sampling.greedy else inverse_temperature(sampling),
            top_p=sampling.top_p,
            least_scaled=least_scaled(sampling.min_p),
            top_k=sampling.top_k,
            alternatives=-1 if sampling.logprobs is None else sampling.logprobs,
            min_tokens=sampling.min_tokens,
            bias_count=len(self._bias_tokens),
            masked_count=len(self._masked),
            bias_tokens=self._bias_tokens.ctypes.data,
            bias_values=self._bias_values.ctypes.data,
            masked=self._masked.ctypes.data,
            repetition=sampling.repetition_penalty,
            presence=sampling.presence_penalty,
            frequency=sampling.frequency_penalty,
        )


def inverse_temperature(sampling: SamplingParameters) -> float:
    return 1.0 / max(sampling.temperature, LEAST_TEMPERATURE)


def least_scaled(min_p: float) -> float:
    """The least (logit - best logit) / temperature that min-p keeps."""
    return math.log(min_p) if min_p > 0.0 else -math.inf
