"""What a worker's prefix cache gained and lost, in numbered pages."""

from dataclasses import dataclass

NAME_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePage:
    """`added` and `removed` are names of full blocks, 16 bytes each, one after another: most who hear a page only pass it by.

    `number` counts the pages with news that this incarnation has sent, this one included; a page without news repeats the
    number, so that a lost page is noticed although nothing changes any more. With `restart` all that was told before is void
    and the whole set follows, beginning here.
    """

    number: int
    restart: bool = False
    added: bytes = b""
    removed: bytes = b""

    def __post_init__(self) -> None:
        if len(self.added) % NAME_BYTES or len(self.removed) % NAME_BYTES:
            raise ValueError(f"names of blocks have {NAME_BYTES} bytes each")
        if self.number < self.is_news:
            raise ValueError("pages with news are numbered from 1 on")

    @property
    def is_news(self) -> bool:
        return self.restart or bool(self.added) or bool(self.removed)

    @property
    def follows(self) -> int:
        """The number that a listener must have reached to apply this page."""
        return self.number - self.is_news
