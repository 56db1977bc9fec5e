"""Tokenising off the event loop, and the tokenizers of the models that are served.

A prompt of megabytes takes seconds to tokenise; in its own thread it delays other long prompts, never a running stream.
"""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from common.values.errors import Overloaded
from common.values.ids import ModelKey
from common.values.model_card import ModelCard
from services.gateway.text.text_model import TextModel

INLINE_CHARACTERS = 1024
MAX_WAITING_CHARACTERS = 64 * 2**20
MAX_MODELS = 16

T = TypeVar("T")


class TextThread:
    """One thread with a queue before it, bounded by the characters that wait; short texts are done at once by the caller."""

    def __init__(self, *, max_waiting_characters: int = MAX_WAITING_CHARACTERS) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="text")
        self._limit = max_waiting_characters
        self._waiting = 0
        self._lock = threading.Lock()

    async def run(self, work: Callable[[], T], *, characters: int) -> T:
        """Raises Overloaded where too many texts wait already. A cancelled caller's text keeps its place until it is done."""
        if characters <= INLINE_CHARACTERS:
            return work()
        if self._waiting + characters > self._limit:
            raise Overloaded("too many long prompts wait to be tokenised")
        future = self._executor.submit(work)
        self._count(characters)
        future.add_done_callback(lambda _: self._count(-characters))
        return await asyncio.wrap_future(future)

    def _count(self, characters: int) -> None:
        with self._lock:  # the thread counts down, the event loop up
            self._waiting += characters

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


class TextModels:
    """The text side of the models in use, built on first use, the least recently used dropped."""

    def __init__(self, thread: TextThread) -> None:
        self._thread = thread
        self._models: OrderedDict[ModelKey, TextModel] = OrderedDict()
        self._building = asyncio.Lock()

    async def get(self, card: ModelCard) -> TextModel:
        if card.model not in self._models:
            async with self._building:
                if card.model not in self._models:
                    built = await self._thread.run(lambda: TextModel(card), characters=INLINE_CHARACTERS + 1)
                    self._models[card.model] = built
                    if len(self._models) > MAX_MODELS:
                        self._models.popitem(last=False)
        self._models.move_to_end(card.model)
        return self._models[card.model]
