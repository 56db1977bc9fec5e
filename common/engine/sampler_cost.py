"""What drawing the tokens of a step costs by itself, apart from the forward."""

import torch

from common.engine.machine_peaks import Clock
from common.engine.sampler import Sampler
from common.engine.sequence_state import SequenceState
from common.values.sampling import SamplingParameters
from common.values.step import SequenceStart


class SamplerCost:
    """Draws for `rows` sequences from the same random logits, which are made once."""

    def __init__(self, sampler: Sampler, *, vocab_size: int, rows: int, sampling: SamplingParameters) -> None:
        self._sampler = sampler
        generator = torch.Generator().manual_seed(2)
        self._logits = torch.randn(rows, vocab_size, generator=generator) * 3
        self._states = [
            SequenceState(SequenceStart(handle=row, choice=0, prompt_length=1, tokens=(0,), sampling=sampling, eos_token_ids=()))
            for row in range(rows)
        ]

    def run_s(self, clock: Clock) -> float:
        logits = self._logits.clone()
        with torch.inference_mode():
            began = clock()
            drawn = self._sampler.draw(logits, self._states)
            took = clock() - began
        assert all(one.fault is None for one in drawn)
        return took
