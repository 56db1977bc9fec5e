"""The headers by which a client can come back to its request: `x-segue-resume`, `Idempotency-Key`, `Last-Event-ID`."""

import hashlib
from urllib.parse import parse_qs

import msgspec

from common.protocol.request_record import IdempotencyMark
from common.values.errors import InvalidRequest
from common.values.request_class import WantedSpeed
from services.gateway.http.asgi import Scope, header
from services.gateway.openai.body import CommonBody
from services.gateway.openai.plan import Asker

MAX_KEY_CHARACTERS = 255


def asker_of(scope: Scope, tenant: str, body: CommonBody, wanted: WantedSpeed) -> Asker:
    """A client that names an idempotency key means to repeat its request if need be, so that it lives on as well. Raises
    InvalidRequest."""
    mark = _mark(header(scope, b"idempotency-key"), tenant, body)
    return Asker(tenant=tenant, lingers=_wants_to_resume(scope) or mark is not None, idempotency=mark, wanted=wanted)


def last_event_id(scope: Scope) -> str:
    """Of the header, which browsers send by themselves, else of the query. Raises InvalidRequest."""
    try:
        value = header(scope, b"last-event-id")
        if value is not None:
            return value.decode("ascii").strip()
        query: dict[str, list[str]] = parse_qs(bytes(scope["query_string"]).decode("ascii"))
    except UnicodeDecodeError as error:
        raise InvalidRequest("the last event id must be ASCII", param="last_event_id") from error
    return query.get("last_event_id", [""])[0].strip()


def _wants_to_resume(scope: Scope) -> bool:
    value = header(scope, b"x-segue-resume")
    if value not in (None, b"0", b"1"):
        raise InvalidRequest("x-segue-resume takes 1 (the stream may be resumed) or 0", param="x-segue-resume")
    return value == b"1"


def _mark(key: bytes | None, tenant: str, body: CommonBody) -> IdempotencyMark | None:
    if key is None:
        return None
    text = key.strip()
    if not 0 < len(text) <= MAX_KEY_CHARACTERS or not text.isascii() or not text.decode().isprintable():
        raise InvalidRequest(f"Idempotency-Key takes 1 to {MAX_KEY_CHARACTERS} printable ASCII characters", param="Idempotency-Key")
    digest = hashlib.blake2b(tenant.encode() + b"\0" + text, digest_size=16).hexdigest()
    normalised = type(body).__name__.encode() + msgspec.json.encode(body, order="deterministic")
    return IdempotencyMark(key=digest, digest=hashlib.blake2b(normalised, digest_size=16).digest())
