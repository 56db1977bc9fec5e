"""Whether all that was said once is still said: of what is kept of earlier releases."""

from typing import Any


def check_kept(then: Any, now: Any, where: str) -> None:
    """Whatever was there still is, under its name and with its value; a later release may have added more."""
    if isinstance(then, dict):
        for name, value in then.items():
            assert name in now, f"{where}.{name} is gone"
            check_kept(value, now[name], f"{where}.{name}")
    elif isinstance(then, list):
        assert len(now) >= len(then), where
        for index, value in enumerate(then):
            check_kept(value, now[index], f"{where}[{index}]")
    else:
        assert (type(now), now) == (type(then), then), where
