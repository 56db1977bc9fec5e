"""Drawing by the kernels: one call for all rows of a step. See draw.h; torch_sampler.py is the definition."""

from collections.abc import Sequence
from ctypes import addressof, c_void_p

import numpy as np
import torch
from numpy.typing import NDArray

from common.engine.logprobs import from_logits
from common.engine.native.library import NativeEngine, NativeLibrary
from common.engine.sampler import ALL_MASKED, NOT_FINITE, Drawn
from common.engine.sequence_state import SequenceState
from common.engine.torch_sampler import TorchSampler
from common.values.errors import InvariantBroken
from common.values.sampling import MAX_LOGPROBS
from common.values.tokens import PositionLogprobs

_DRAW = np.dtype(
    [
        ("fault", np.int32),
        ("token", np.int32),
        ("whole", np.int64),
        ("rank", np.int32),
        ("alternatives", np.int32),
        ("best", np.float32),
        ("value", np.float32),
        ("tokens", np.int32, (MAX_LOGPROBS,)),
        ("values", np.float32, (MAX_LOGPROBS,)),
    ]
)
"""`Draw` of draw.h."""
_FAULTS = (None, NOT_FINITE, ALL_MASKED)


class NativeSampler:
    """A Sampler. Its threads are its own: they sleep while the model's compute."""

    def __init__(self, library: NativeLibrary) -> None:
        self._library = library
        self._engine = NativeEngine(library)

    def prepare_thread(self, threads: int) -> None:
        self._engine = NativeEngine(self._library, threads)

    def draw(self, logits: torch.Tensor, states: Sequence[SequenceState]) -> list[Drawn]:
        if not states:
            return []
        vocabulary = _checked(logits, len(states))
        rows = [state.draw_row(vocabulary) for state in states]
        addresses = (c_void_p * len(rows))(*map(addressof, rows))
        found = np.empty(len(rows), dtype=_DRAW)
        self._engine.draw(logits.data_ptr(), logits.stride(0), vocabulary, addresses, found.ctypes.data, len(rows))
        drawn = [
            Drawn(token=token, fault=_FAULTS[fault])
            for token, fault in zip(found["token"].tolist(), found["fault"].tolist(), strict=True)
        ]
        for i, state in enumerate(states):
            if state.sampling.logprobs is not None and drawn[i].fault is None:
                drawn[i] = Drawn(token=drawn[i].token, logprobs=_logprobs(found[i]))
        return drawn

    def score(self, logits: torch.Tensor, tokens: Sequence[int], alternatives: int) -> list[PositionLogprobs] | None:
        if not tokens:
            return []
        vocabulary = _checked(logits, len(tokens))
        given: NDArray[np.int64] = np.array(tokens, dtype=np.int64)
        found = np.empty(len(given), dtype=_DRAW)
        self._engine.score(
            logits.data_ptr(), logits.stride(0), vocabulary, given.ctypes.data, alternatives, found.ctypes.data, len(given)
        )
        return None if found["fault"].any() else [_logprobs(one) for one in found]


def choose_sampler(library: NativeLibrary | None, device: str) -> NativeSampler | TorchSampler:
    """The kernels read this machine's memory."""
    return TorchSampler() if library is None or torch.device(device).type != "cpu" else NativeSampler(library)


def _checked(logits: torch.Tensor, rows: int) -> int:
    """How many tokens there are."""
    if logits.dtype != torch.float32 or logits.device.type != "cpu" or logits.stride(-1) != 1 or len(logits) != rows:
        raise InvariantBroken(f"logits of {tuple(logits.shape)} in {logits.dtype} on {logits.device} are not {rows} rows in memory")
    return int(logits.shape[-1])


def _logprobs(found: np.void) -> PositionLogprobs:
    count = int(found["alternatives"])
    return from_logits(
        best=float(found["best"]),
        whole=int(found["whole"]),
        chosen=float(found["value"]),
        rank=int(found["rank"]),
        top=list(zip(found["tokens"][:count].tolist(), found["values"][:count].tolist(), strict=True)),
    )
