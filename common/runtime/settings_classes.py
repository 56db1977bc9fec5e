"""Classes of requests as an operator writes them: `NAME`, then any of `ttft=MS`, `tpot=MS`, `late=refuse|best_effort`, by colons."""

import math
from collections.abc import Sequence
from typing import cast

from common.values.errors import SettingsError
from common.values.request_class import DEFAULT_CLASS, LatePolicy, RequestClass

TAKES = "NAME[:ttft=MS][:tpot=MS][:late=refuse|best_effort]"


def request_classes(texts: Sequence[str], *, ttft_s: float | None, tpot_s: float | None) -> tuple[RequestClass, ...]:
    """The default class first: what `texts` say of it, else the mesh's own objectives. Raises SettingsError."""
    found = [_request_class(text) for text in texts]
    names = [each.name for each in found]
    if len(set(names)) < len(names):
        raise SettingsError("--request-class: a class is given twice")
    if DEFAULT_CLASS not in names:
        found.insert(0, RequestClass(name=DEFAULT_CLASS, ttft_s=ttft_s, tpot_s=tpot_s))
    return tuple(sorted(found, key=lambda each: each.name != DEFAULT_CLASS))


def _request_class(text: str) -> RequestClass:
    name, *parts = text.split(":")
    given = dict(part.partition("=")[::2] for part in parts)
    late = given.pop("late", "best_effort")
    try:
        if late not in ("refuse", "best_effort") or not given.keys() <= {"ttft", "tpot"} or len(parts) > 3:
            raise ValueError
        return RequestClass(
            name=_name(name), ttft_s=_seconds(given.get("ttft")), tpot_s=_seconds(given.get("tpot")), late=cast("LatePolicy", late)
        )
    except ValueError:
        raise SettingsError(f"--request-class takes {TAKES}, not {text!r}") from None


def _name(name: str) -> str:
    if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
        raise ValueError
    return name


def _seconds(milliseconds: str | None) -> float | None:
    if milliseconds is None:
        return None
    seconds = float(milliseconds) / 1000.0
    if not (math.isfinite(seconds) and seconds > 0.0):
        raise ValueError
    return seconds
