"""What a setting may hold: how its text is read, and the words that tell a person what it takes.

A kind reads a value from any source: text (a flag, the environment) or a TOML value. It raises ValueError where the value
is not of the kind; the caller adds the setting's name and where the value came from.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

_SIZE_UNITS = {"": 1, "b": 1, "k": 1000, "kb": 1000, "m": 1000**2, "mb": 1000**2, "g": 1000**3, "gb": 1000**3}
_SIZE_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind(Generic[T]):
    """`takes` completes the sentence "… takes"; `switch` marks an on/off kind, whose flag needs no value;
    `many` marks a kind whose flag may be repeated (the values are joined by commas)."""

    takes: str
    read: Callable[[object], T]
    switch: bool = False
    many: bool = False


def one_of(*names: str) -> Kind[str]:
    def read(value: object) -> str:
        text = _text(value).lower()
        if text not in names:
            raise ValueError
        return text

    return Kind(takes="one of " + ", ".join(names), read=read)


def whole(minimum: int, maximum: int | None = None) -> Kind[int]:
    def read(value: object) -> int:
        number = int(value.replace("_", "")) if isinstance(value, str) else value
        if isinstance(number, bool) or not isinstance(number, int) or number < minimum or (maximum is not None and number > maximum):
            raise ValueError
        return number

    return Kind(takes=f"a whole number from {minimum}" + (f" to {maximum}" if maximum is not None else " on"), read=read)


def number_of_seconds(*, above_zero: bool = True) -> Kind[float]:
    def read(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        seconds = float(value)
        if not 0.0 <= seconds < 1e9 or (above_zero and seconds == 0.0):
            raise ValueError
        return seconds

    return Kind(takes="a number of seconds" + (" above 0" if above_zero else ", 0 or more"), read=read)


def number_of_milliseconds() -> Kind[float]:
    seconds = number_of_seconds()
    return Kind(takes="a number of milliseconds above 0", read=seconds.read)


def auto_or(kind: Kind[T]) -> Kind[T | None]:
    """`auto` (the value is computed or there is none) or the given kind."""

    def read(value: object) -> T | None:
        return None if isinstance(value, str) and value.strip().lower() in ("auto", "none") else kind.read(value)

    return Kind(takes=f"{kind.takes}, or auto", read=read, many=kind.many)


def texts(*allowed: str) -> Kind[tuple[str, ...]]:
    """Several texts: a comma-separated list, a repeated flag, or a TOML list."""

    def read(value: object) -> tuple[str, ...]:
        items = list(value) if isinstance(value, list | tuple) else _text(value).split(",")
        found = tuple(dict.fromkeys(_text(item).strip() for item in items if _text(item).strip()))
        if allowed and (not found or not set(found) <= set(allowed)):
            raise ValueError
        return found

    of = f" of {', '.join(allowed)}" if allowed else ""
    return Kind(takes=f"a comma-separated list{of}", read=read, many=True)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _read_any_text(value: object) -> str:
    text = _text(value)
    if not text.strip() or "\0" in text:
        raise ValueError
    return text


def _read_identifier(value: object) -> str:
    text = _text(value)
    if not _IDENTIFIER.match(text):
        raise ValueError
    return text


def _read_switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    text = _text(value).strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off"):
        return False
    raise ValueError


def _read_size(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        size = float(value)
    else:
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", _text(value))
        if match is None or match[2].lower() not in _SIZE_UNITS:
            raise ValueError
        size = float(match[1]) * _SIZE_UNITS[match[2].lower()]
    if not 1 <= size < 2**62:
        raise ValueError
    return int(size)


def _read_cores(value: object) -> tuple[int, ...]:
    """`0,2-4` → (0, 2, 3, 4): the notation of taskset."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    items = [str(item) for item in value] if isinstance(value, list | tuple) else _text(value).split(",")
    cores: set[int] = set()
    for item in items:
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", item)
        if match is None:
            raise ValueError
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError
        cores.update(range(first, last + 1))
    return tuple(sorted(cores))


def _read_file(value: object) -> str:
    """Absolute: the process that reads the file may run in another folder."""
    return str(Path(_read_any_text(value)).expanduser().resolve())


TEXT: Kind[str] = Kind(takes="a text", read=_read_any_text)
FILE: Kind[str] = Kind(takes="the path of a file", read=_read_file)
IDENTIFIER: Kind[str] = Kind(takes="letters, digits, - and _ (at most 128)", read=_read_identifier)
SWITCH: Kind[bool] = Kind(takes="true or false", read=_read_switch, switch=True)
BYTES: Kind[int] = Kind(takes="a number of bytes, with a suffix such as 512MiB or 2GiB", read=_read_size)
CORES: Kind[tuple[int, ...]] = Kind(takes="core numbers such as 0,2-4", read=_read_cores, many=True)
PORT: Kind[int] = whole(0, 65535)
