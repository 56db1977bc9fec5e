"""Model cards in the store: written by the workers of a model, read by gateways. A card outlives its last worker by a minute."""

import msgspec

from common.ports.state_store import StateStore
from common.protocol.subjects import Names
from common.values.errors import PeerError
from common.values.ids import ModelKey
from common.values.model_card import ModelCard

CARD_TTL_S = 60.0
CARD_RENEWAL_S = 5.0
"""Also how soon a store that was restarted empty has the cards again."""
CARD_FIELD = "card"
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ModelCard)


async def publish_card(store: StateStore, names: Names, card: ModelCard) -> None:
    """Renewing is one short command; the card itself is sent only where it is missing."""
    key = names.model_key(card.model)
    if not await store.refresh(key, ttl_s=CARD_TTL_S):
        await store.put(key, {CARD_FIELD: _encoder.encode(card)}, ttl_s=CARD_TTL_S)


async def read_card(store: StateStore, names: Names, model: ModelKey) -> ModelCard | None:
    record = await store.read(names.model_key(model))
    if record is None or CARD_FIELD not in record:
        return None
    try:
        return _decoder.decode(record[CARD_FIELD])
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise PeerError(f"the card of {model.name} cannot be read: {error}") from error
