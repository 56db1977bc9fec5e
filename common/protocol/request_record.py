"""The fields of a request record in the store: what another gateway would need to take the request over."""

import msgspec

from common.values.ids import GatewayId, ModelKey
from common.values.sampling import SamplingParameters

PROMPT_FIELD = "prompt"
RUNNING_TTL_S = 600.0
RENEWAL_S = 120.0
ENDED_TTL_S = 600.0
_encode = msgspec.msgpack.Encoder().encode


def first_record(
    *,
    gateway: GatewayId,
    model: ModelKey,
    prompt: bytes,
    sampling: SamplingParameters,
    choices: int,
    body: bytes,
    created: float,
) -> dict[str, bytes]:
    """`prompt` as packed ids, `body` as normalised JSON; `created` is wall-clock seconds, for people."""
    return {
        "state": b"accepted",
        "owner": gateway.encode(),
        "epoch": b"1",
        "attempt": b"0",
        "model": _encode(model),
        PROMPT_FIELD: prompt,
        "sampling": _encode(sampling),
        "choices": str(choices).encode(),
        "body": body,
        "created": f"{created:.6f}".encode(),
    }


def attempt_change(attempt: int, worker: str, decode_worker: str | None) -> dict[str, bytes]:
    return {
        "state": b"running",
        "attempt": str(attempt).encode(),
        "worker": worker.encode(),
        "decode_worker": (decode_worker or "").encode(),
    }


def ending_change(state: str, *, seconds: dict[str, float], tokens: int) -> dict[str, bytes]:
    """`seconds` holds the request's timeline: named durations since it was accepted. The prompt is kept no longer."""
    return {
        "state": state.encode(),
        "tokens": str(tokens).encode(),
        "seconds": _encode({name: round(value, 6) for name, value in seconds.items()}),
        PROMPT_FIELD: b"",
        "body": b"",
    }
