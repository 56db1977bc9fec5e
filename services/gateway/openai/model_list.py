"""`/v1/models`: what live workers serve now."""

from collections.abc import Sequence

import msgspec

from common.values.model_card import ModelCard


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "segue"
    root: str
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[ModelEntry]


def model_entry(card: ModelCard) -> ModelEntry:
    return ModelEntry(id=card.model.name, created=card.created, root=card.model.name, max_model_len=card.max_model_len)


def model_list(cards: Sequence[ModelCard]) -> ModelList:
    """One entry a name, although two revisions may be served while one replaces the other."""
    entries = {card.model.name: model_entry(card) for card in cards}
    return ModelList(data=list(entries.values()))
