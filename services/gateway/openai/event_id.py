"""Where a client stands in a stream: the id of the last event that it has, one count of consumed tokens per choice (`17.9`)."""

import re

from common.values.errors import InvalidRequest

_SHAPE = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9}){0,127}\Z")


def parse_event_id(text: str, choices: int) -> tuple[int, ...]:
    """No text is the beginning. Raises InvalidRequest where this is no id of a stream with so many choices."""
    if not text:
        return (0,) * choices
    counts = tuple(int(part) for part in text.split(".")) if _SHAPE.match(text) else ()
    if len(counts) != choices:
        raise InvalidRequest(f"the last event id must be one number of tokens for each of the {choices} choices, as in 17.9")
    return counts


def format_event_id(counts: list[int]) -> str:
    return ".".join(map(str, counts))
