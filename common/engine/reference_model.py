"""The model by itself: transformers' modules with their own attention, in float32, one sequence at a time, no cache of ours.

What every other way of computing is held against. A whole answer is checked by one forward over prompt and answer: the
token at each place must be the likeliest after all that stands before it.
"""

from collections.abc import Iterator, Sequence

import torch
from transformers import DynamicCache

from common.engine.load_model import load_model
from common.engine.model_files import ModelFolder

WINDOW_POSITIONS = 256
WINDOW_LOGITS = 2**24


class ReferenceModel:
    def __init__(self, folder: ModelFolder, *, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = load_model(folder, dtype="float32", attn_implementation="eager")
        self.vocab_size = folder.config().vocab_size

    def shortfalls(self, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
        """By how much each token's logit falls short of the best one, given what stands before it; 0.0 for the best itself."""
        with torch.inference_mode():
            ids = torch.tensor([[*prompt, *answer]])
            logits = self._model(ids, logits_to_keep=len(answer) + 1, use_cache=False).logits[0, :-1].float()
            best = logits.max(dim=-1).values
            chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
            return [float(short) for short in best - chosen]

    def windows(self, text: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """`(first, log-probabilities [positions, vocabulary])` of what follows each position, window by window."""
        cache = DynamicCache()
        size = window_positions(self.vocab_size)
        for first in range(0, len(text), size):
            ids = torch.tensor([list(text[first : first + size])])
            with torch.inference_mode():
                logits = self._model(ids, past_key_values=cache, use_cache=True).logits[0]
                yield first, torch.log_softmax(logits.float(), dim=-1)


def window_positions(vocab_size: int) -> int:
    """As many as keep a window's logits small."""
    return max(1, min(WINDOW_POSITIONS, WINDOW_LOGITS // vocab_size))
