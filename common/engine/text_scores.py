"""How a forward scores a fixed text beside the reference: both are given the text, so nothing adds up from place to place."""

import math
from collections.abc import Sequence

import torch

from common.engine.paged_batch import BatchRow
from common.engine.reference_model import ReferenceModel
from common.engine.text_figures import TextScores
from common.engine.watched_forward import WatchedModel


def score_text(reference: ReferenceModel, watched: WatchedModel, text: Sequence[int]) -> TextScores:
    """The text goes through the paged cache window by window, as chunks of a prompt do."""
    blocks = tuple(range(watched.cache.layout.blocks_for(len(text))))
    scored = len(text) - 1
    mine = theirs = divergence = 0.0
    same = 0
    for first, expected in reference.windows(text):
        count = min(len(expected), scored - first)
        tokens = list(text[first : first + len(expected)])
        row = BatchRow(tokens=tokens, start=first, blocks=blocks, kept=range(len(tokens)))
        with torch.inference_mode():
            found = torch.log_softmax(watched.forward.unwatched_logits(watched.cache, [row])[:, : expected.shape[1]], dim=-1)
            following = torch.tensor(text[first + 1 : first + 1 + count])[:, None]
            expected, found = expected[:count], found[:count]
            mine -= float(found.gather(1, following).sum(dtype=torch.float64))
            theirs -= float(expected.gather(1, following).sum(dtype=torch.float64))
            divergence += float((expected.exp() * (expected - found)).sum(dtype=torch.float64))
            same += int((expected.argmax(-1) == found.argmax(-1)).sum())
    return TextScores(
        tokens=scored,
        perplexity=math.exp(mine / scored),
        reference_perplexity=math.exp(theirs / scored),
        divergence=divergence / scored,
        same_likeliest=same / scored,
    )
