"""How a service logs: one event a line, with fields, on stderr.

Any module logs by the standard library alone: `logger.warning("worker_lost", extra={"fields": {"worker": worker_id}})`.
The message is the event's name; what varies goes into the fields. As text a line is

    2025-03-01T12:00:00.123Z warning decode-1 worker_lost worker=prefill-0 logger=common.mesh.router

and as JSON it is an object with the keys `time`, `level`, `service`, `event`, `logger` and the fields. No line ever holds
prompts, tokens or keys: fields with such names are blanked here, whoever passed them, and long values are cut.
"""

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Literal, TextIO

LogFormat = Literal["text", "json"]
FieldValue = str | int | float | bool | None

NEVER_LOGGED = frozenset(
    (
        "api_key",
        "authorization",
        "body",
        "cluster_key",
        "content",
        "messages",
        "password",
        "payload",
        "prompt",
        "secret",
        "text",
        "token",
        "tokens",
    )
)
BLANKED = "[withheld]"
MAX_VALUE_CHARACTERS = 500
MAX_TRACEBACK_CHARACTERS = 8000


def configure_logging(*, service: str, level: str = "INFO", log_format: LogFormat = "text", stream: TextIO | None = None) -> None:
    """Give the root logger this one handler, in place of those it had. Call it once, first thing in a main.

    `service` is who speaks (`gateway`, `decode-1`). Warnings of Python become events too.
    """
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(EventFormatter(service, log_format))
    root = logging.getLogger()
    for previous in list(root.handlers):
        root.removeHandler(previous)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(capture=True)


class EventFormatter(logging.Formatter):
    """Writes a record as one line of text or one JSON object."""

    def __init__(self, service: str, log_format: LogFormat) -> None:
        super().__init__()
        self._service = service
        self._log_format = log_format

    def format(self, record: logging.LogRecord) -> str:
        fields = self._fields(record)
        level = record.levelname.lower()
        if self._log_format == "json":
            head = {"time": _timestamp(record.created), "level": level, "service": self._service, "event": record.getMessage()}
            return json.dumps({**fields, **head}, ensure_ascii=False, default=str)
        words = [_timestamp(record.created), level, self._service, _one_line(record.getMessage())]
        return " ".join(words + [f"{name}={_quoted(value)}" for name, value in fields.items()])

    def _fields(self, record: logging.LogRecord) -> dict[str, FieldValue]:
        given = getattr(record, "fields", None)
        fields = {str(name): _shown(str(name), value) for name, value in given.items()} if isinstance(given, Mapping) else {}
        fields["logger"] = record.name
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)[-MAX_TRACEBACK_CHARACTERS:]
        return fields


def _shown(name: str, value: object) -> FieldValue:
    if name.lower() in NEVER_LOGGED:
        return BLANKED
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    return text if len(text) <= MAX_VALUE_CHARACTERS else f"{text[:MAX_VALUE_CHARACTERS]}…"


def _quoted(value: FieldValue) -> str:
    """As it is where it is one plain word, else as a JSON string: a line can be split at its blanks outside of quotes."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = "none" if value is None else str(value)
    is_plain = text and text.isprintable() and not any(character in ' "=' for character in text)
    return text if is_plain else json.dumps(text, ensure_ascii=False)


def _one_line(message: str) -> str:
    return message.replace("\r", "\\r").replace("\n", "\\n")


def _timestamp(seconds: float) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{int(seconds % 1 * 1000):03d}Z"
