"""The models that live workers serve, by the cards that they publish in the store."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence

from common.mesh.worker_registry import WorkerRegistry
from common.ports.state_store import StateStore
from common.protocol.subjects import Names
from common.runtime.model_cards import read_card
from common.values.errors import ModelNotFound, PeerError, StoreUnavailable, Unavailable
from common.values.ids import ModelKey
from common.values.model_card import ModelCard
from common.values.worker import WorkerSnapshot

CARD_RETRY_S = 1.0
logger = logging.getLogger(__name__)


class ModelDirectory:
    """`spawn` runs a coroutine in the gateway's task group."""

    def __init__(
        self,
        store: StateStore,
        names: Names,
        registry: WorkerRegistry,
        spawn: Callable[[Coroutine[None, None, None], str], None],
    ) -> None:
        self._store = store
        self._names = names
        self._registry = registry
        self._spawn = spawn
        self._cards: dict[ModelKey, ModelCard] = {}
        self._loading: set[ModelKey] = set()
        self._loaded = asyncio.Event()

    async def first(self, *, timeout_s: float) -> None:
        """Wait until a model can be served, but not for ever: a gateway that restarts should not say that there is none."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._loaded.wait()
        except TimeoutError:
            logger.info("no_model_yet")

    def cards(self) -> Sequence[ModelCard]:
        """The newest revision of each name."""
        newest: dict[str, ModelCard] = {}
        for model in self._registry.models():
            card = self._cards.get(model)
            if card is not None and (model.name not in newest or card.created >= newest[model.name].created):
                newest[model.name] = card
        return sorted(newest.values(), key=lambda card: card.model.name)

    def card(self, name: str) -> ModelCard:
        """Raises ModelNotFound, Unavailable."""
        cards = self.cards()
        if not cards:
            raise Unavailable("no worker is ready yet", retry_after_s=2.0)
        for card in cards:
            if card.model.name == name:
                return card
        there = ", ".join(card.model.name for card in cards)
        raise ModelNotFound(f"there is no model {name!r}; models served now: {there}", param="model")

    def heard(self, snapshot: WorkerSnapshot) -> None:
        """A worker serves this model: read its card where it is new here."""
        model = snapshot.model
        card = self._cards.get(model)
        known = card is not None and card.max_model_len == snapshot.max_model_len
        if not known and model not in self._loading:
            self._loading.add(model)
            self._spawn(self._load(model), f"card {model.name}")

    async def _load(self, model: ModelKey) -> None:
        try:
            card = await read_card(self._store, self._names, model)
            if card is not None:
                self._cards[model] = card
                self._loaded.set()
            else:
                await asyncio.sleep(CARD_RETRY_S)
        except (StoreUnavailable, PeerError) as error:
            logger.warning("card_not_read", extra={"fields": {"model": model.name, "reason": str(error)}})
            await asyncio.sleep(CARD_RETRY_S)
        finally:
            self._loading.discard(model)
