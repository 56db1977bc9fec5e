"""The request record in the store: what another gateway needs to take a request over, or to show it again once it has ended.

Most of it is written once. `owner`, `epoch` and `attempt` change only by compare-and-set on owner and epoch: whoever fails in
it has lost the request.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

import msgspec

from common.protocol.messages import pack_ids, unpack_ids
from common.values.errors import PeerError, RequestError
from common.values.ids import GatewayId, ModelKey, WorkerId
from common.values.request_account import RequestAccount
from common.values.request_class import WantedSpeed
from common.values.sampling import SamplingParameters

PROMPT_FIELD = "prompt"
RUNNING_TTL_S = 600.0
RENEWAL_S = 120.0
ENDED_TTL_S = 600.0
RESERVED_TTL_S = 10.0
"""An idempotency key before its request is admitted: longer than any admission takes."""

RecordState = Literal["running", "ended", "cancelled", "failed"]


class IdempotencyMark(msgspec.Struct, frozen=True, kw_only=True):
    """`key` is a digest of the tenant and its Idempotency-Key, `digest` one of the body that it came with."""

    key: str
    digest: bytes


class RecordedError(msgspec.Struct, frozen=True, kw_only=True):
    message: str
    code: str
    status: int


class RequestFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What never changes. `body` is the normalised request as the gateways' text side writes it; `tenant` is a digest of the
    API key that asked; `lingers`: the request lives on for a while without its client."""

    model: ModelKey
    sampling: SamplingParameters
    choices: int
    body: bytes = b""
    salt: bytes = b""
    tenant: str = ""
    lingers: bool = False
    keep_prompt: bool = False
    deadline_s: float | None = None
    idempotency: IdempotencyMark | None = None
    wanted: WantedSpeed = WantedSpeed()


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """`prompt` is empty once the request has ended, unless its answer shows the prompt. `seconds`: the moments of an ended one,
    since it was accepted."""

    state: RecordState
    owner: GatewayId
    epoch: int
    attempt: int
    prompt: tuple[int, ...]
    facts: RequestFacts
    worker: WorkerId | None = None
    decode_worker: WorkerId | None = None
    error: RecordedError | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    account: RequestAccount | None = None


_encode = msgspec.msgpack.Encoder().encode
_facts = msgspec.msgpack.Decoder(RequestFacts)
_seconds = msgspec.msgpack.Decoder(dict[str, float])
_account = msgspec.msgpack.Decoder(RequestAccount)
_error = msgspec.msgpack.Decoder(RecordedError)


def first_record(
    *,
    gateway: GatewayId,
    epoch: int,
    prompt: tuple[int, ...],
    facts: RequestFacts,
    created: float,
) -> dict[str, bytes]:
    """`created` is wall-clock seconds, for people."""
    return {
        "state": b"running",
        "owner": gateway.encode(),
        "epoch": str(epoch).encode(),
        "attempt": b"0",
        PROMPT_FIELD: pack_ids(prompt),
        "facts": _encode(facts),
        "created": f"{created:.6f}".encode(),
    }


def ownership(gateway: GatewayId, epoch: int) -> dict[str, bytes]:
    """What a compare-and-set by this owner expects, and what one that takes over writes."""
    return {"owner": gateway.encode(), "epoch": str(epoch).encode()}


def attempt_change(attempt: int, worker: str | None, decode_worker: str | None) -> dict[str, bytes]:
    return {
        "attempt": str(attempt).encode(),
        "worker": (worker or "").encode(),
        "decode_worker": (decode_worker or "").encode(),
    }


def ending_change(
    state: RecordState,
    *,
    seconds: dict[str, float],
    tokens: int,
    error: RecordedError | None,
    keep_prompt: bool,
    account: RequestAccount | None = None,
) -> dict[str, bytes]:
    """`seconds` holds the request's timeline: named moments since it was accepted."""
    change = {
        "state": state.encode(),
        "tokens": str(tokens).encode(),
        "seconds": _encode({name: round(value, 6) for name, value in seconds.items()}),
        "error": b"" if error is None else _encode(error),
        "account": b"" if account is None else _encode(account),
    }
    return change if keep_prompt else {**change, PROMPT_FIELD: b""}


def parse_record(fields: Mapping[str, bytes]) -> RequestRecord:
    """Raises PeerError where this is no record of ours."""
    try:
        error, seconds, account = fields.get("error"), fields.get("seconds"), fields.get("account")
        state = fields["state"].decode()
        if state not in ("running", "ended", "cancelled", "failed"):
            raise ValueError(f"state {state}")
        return RequestRecord(
            state=cast("RecordState", state),
            owner=GatewayId(fields["owner"].decode()),
            epoch=int(fields["epoch"]),
            attempt=int(fields["attempt"]),
            prompt=unpack_ids(fields[PROMPT_FIELD]),
            facts=_facts.decode(fields["facts"]),
            worker=_worker(fields, "worker"),
            decode_worker=_worker(fields, "decode_worker"),
            error=_error.decode(error) if error else None,
            seconds=_seconds.decode(seconds) if seconds else {},
            account=_account.decode(account) if account else None,
        )
    except (KeyError, ValueError, TypeError, msgspec.DecodeError, RequestError) as error_:
        raise PeerError(f"malformed request record: {type(error_).__name__}") from error_


def _worker(fields: Mapping[str, bytes], name: str) -> WorkerId | None:
    value = fields.get(name, b"").decode()
    return WorkerId(value) if value else None
