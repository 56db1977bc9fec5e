"""What is done to a row of logits before anything is read from it: bias, penalties, and the masks of min_tokens and
of a grammar.

The order is logit_bias, repetition penalty (over prompt and new tokens), frequency and presence penalties (over new tokens
only), masks. native/draw.h does the same, operation by operation. A row that asks for none of these is not touched.
"""

import numpy as np
import torch

from common.engine.sequence_state import SequenceState


def adjusts(state: SequenceState) -> bool:
    return bool(state.sampling.logit_bias or state.penalised or state.masked_tokens) or state.mask is not None


def adjust(logits: torch.Tensor, state: SequenceState) -> None:
    """Change one row `[vocabulary]` of float32 logits in place."""
    sampling = state.sampling
    if sampling.logit_bias:
        tokens = torch.tensor(list(sampling.logit_bias), device=logits.device)
        logits[tokens] += torch.tensor(list(sampling.logit_bias.values()), dtype=logits.dtype, device=logits.device)
    if state.penalised:
        _penalise(logits, state)
    masked = [token for token in state.masked_tokens if 0 <= token < len(logits)]
    if masked:
        logits[torch.tensor(masked, device=logits.device)] = float("-inf")
    allowed = state.allowed(len(logits))
    if allowed is not None:
        bits = np.unpackbits(allowed.view(np.uint8), count=len(logits), bitorder="little")
        logits[torch.from_numpy(bits == 0).to(logits.device)] = float("-inf")


def _penalise(logits: torch.Tensor, state: SequenceState) -> None:
    sampling, counts = state.sampling, state.counts
    tokens = torch.from_numpy(counts.tokens).to(logits.device)
    often = torch.from_numpy(counts.output_counts).to(logits.device, logits.dtype)
    values = logits[tokens]
    if sampling.repetition_penalty != 1.0:
        values = torch.where(values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty)
    values = values - sampling.frequency_penalty * often - sampling.presence_penalty * (often > 0).to(values.dtype)
    logits[tokens] = values
