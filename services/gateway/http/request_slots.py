"""How many requests may be in the gateway at once."""

from collections.abc import Iterator
from contextlib import contextmanager

from common.values.errors import Overloaded


class RequestSlots:
    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.taken = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Hold a slot. Raises Overloaded where none is free."""
        if self.taken >= self._limit:
            raise Overloaded(f"this gateway runs {self._limit} requests at once, and all are taken")
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
