"""Cosines and sines of every position, as transformers' own module computes them, for whatever scaling the model has."""

import numpy as np
import torch
from numpy.typing import NDArray

PART = 4096
"""Positions are added in whole parts of this size: a position's bits do not depend on when the table grew."""


class RotaryTable:
    """`cosine` and `sine` are `[positions, head_dim / 2]`; they are replaced by longer ones as positions are asked for."""

    def __init__(self, rotary: torch.nn.Module, head_dim: int) -> None:
        self._rotary = rotary
        self._half = head_dim // 2
        self.cosine: NDArray[np.float32] = np.empty((0, self._half), dtype=np.float32)
        self.sine: NDArray[np.float32] = np.empty((0, self._half), dtype=np.float32)

    def cover(self, positions: int) -> None:
        """Make the table hold positions 0 to `positions` - 1."""
        while len(self.cosine) < positions:
            first = len(self.cosine)
            places = torch.arange(first, first + PART)[None]
            with torch.inference_mode():
                cosine, sine = self._rotary(torch.zeros(1, 1, 1), places)
            self.cosine = np.concatenate([self.cosine, cosine[0, :, : self._half].numpy()])
            self.sine = np.concatenate([self.sine, sine[0, :, : self._half].numpy()])
