"""Each distinct token of a sequence once, with how often it is among the new ones: what penalties need, kept as it grows."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class TokenCounts:
    """Built once from the tokens that exist; from then on a new token costs the same however long the sequence is."""

    def __init__(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        distinct = np.unique(np.asarray(prompt, dtype=np.int64))
        self._size = len(distinct)
        self._place = dict(zip(distinct.tolist(), range(self._size), strict=True))
        self._tokens = np.concatenate([distinct, np.zeros(256, dtype=np.int64)])
        self._outputs = np.zeros_like(self._tokens)
        self._keep_addresses()
        for token in output:
            self.add(token)

    def add(self, token: int) -> None:
        place = self._place.setdefault(token, self._size)
        if place == self._size:
            self._append(token)
        self._outputs[place] += 1

    @property
    def tokens(self) -> NDArray[np.int64]:
        return self._tokens[: self._size]

    @property
    def output_counts(self) -> NDArray[np.int64]:
        return self._outputs[: self._size]

    @property
    def addresses(self) -> tuple[int, int, int]:
        """How many tokens, where they lie, and where their counts do; until the next one is added."""
        return self._size, self._tokens_at, self._outputs_at

    def _append(self, token: int) -> None:
        if self._size == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
            self._outputs = np.concatenate([self._outputs, np.zeros_like(self._outputs)])
            self._keep_addresses()
        self._tokens[self._size] = token
        self._size += 1

    def _keep_addresses(self) -> None:
        """Asking numpy for an address takes longer than the rest of a step's share of a sequence."""
        self._tokens_at, self._outputs_at = self._tokens.ctypes.data, self._outputs.ctypes.data
