"""One pass of the model over a paged batch."""

import torch

from common.engine.paged_batch import PagedBatch


def forward(model: torch.nn.Module, batch: PagedBatch) -> torch.Tensor:
    """Float32 logits `[kept positions, vocabulary]`. Keys and values of all positions are in the cache afterwards."""
    batch.cache.clear(list(batch.fresh_blocks))
    output = model(
        input_ids=batch.tokens[None],
        position_ids=batch.positions[None],
        attention_mask=None,
        use_cache=False,
        logits_to_keep=batch.kept,
        paged_batch=batch,
    )
    logits = output.logits[0]
    assert isinstance(logits, torch.Tensor)
    return logits.float()
