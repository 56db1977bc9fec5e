"""One event is one line, whatever is in it, and no line holds what must never be logged."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from common.runtime.logs import LogFormat, configure_logging

FORMATS: list[LogFormat] = ["text", "json"]


@pytest.fixture(autouse=True)
def _restored_root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)


def logged(
    log_format: LogFormat, event: str, fields: dict[str, object], *, level: str = "INFO", error: Exception | None = None
) -> list[str]:
    stream = io.StringIO()
    configure_logging(service="decode-1", level=level, log_format=log_format, stream=stream)
    logging.getLogger("common.mesh").warning(event, extra={"fields": fields}, exc_info=error)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("log_format", FORMATS)
def test_an_event_is_one_line_even_with_line_breaks_and_a_traceback(log_format: LogFormat) -> None:
    lines = logged(log_format, "a\nb", {"reason": "two\nlines", "empty": "", "none": None}, error=ValueError("no\ngood"))
    assert len(lines) == 1
    assert "ValueError" in lines[0]


def test_text_has_time_level_service_event_and_fields() -> None:
    [line] = logged("text", "worker_lost", {"worker": "prefill-0", "after_s": 0.25, "reason": "no answer", "formula": "a=b"})
    stamp, rest = line.split(" ", 1)
    assert stamp.endswith("Z")
    assert rest == 'warning decode-1 worker_lost worker=prefill-0 after_s=0.25 reason="no answer" formula="a=b" logger=common.mesh'


def test_json_parses_and_no_field_can_hide_the_event() -> None:
    [line] = logged("json", "worker_lost", {"event": "forged", "blocks": 3, "odd": object})
    parsed = json.loads(line)
    assert (parsed["event"], parsed["level"], parsed["service"], parsed["blocks"]) == ("worker_lost", "warning", "decode-1", 3)


@pytest.mark.parametrize("log_format", FORMATS)
@pytest.mark.parametrize("name", ["prompt", "Text", "api_key", "token", "payload"])
def test_secret_fields_are_blanked(log_format: LogFormat, name: str) -> None:
    [line] = logged(log_format, "request", {name: "Dear diary"})
    assert "diary" not in line


def test_long_values_are_cut_and_lower_levels_are_silent() -> None:
    [line] = logged("text", "request", {"reason": "x" * 100_000})
    assert len(line) < 1000
    assert logged("text", "request", {}, level="error") == []
