"""What the transports of two workers tell each other: the offer, and the requests of the tiers that send messages.

All msgpack with strict types. An offer travels over the authenticated control connection; requests carry the reservation id,
and their sizes are bounded before they are decoded.
"""

from typing import Annotated, TypeVar

import msgspec

from common.values.errors import PeerError
from common.values.kv_layout import KvLayout

MESSAGE_BYTES = 8 << 20
MAX_MESSAGE_BLOCKS = 1024
MAX_REQUEST_BYTES = 64 << 10

Identity = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Secret = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Word = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class TransportOffer(msgspec.Struct, frozen=True, kw_only=True):
    """Whose region, its shape, and per tier what reaches it. Unknown tiers are passed over."""

    v: int = 1
    transport: Identity
    layout: KvLayout
    blocks: Annotated[int, msgspec.Meta(ge=1, lt=2**40)]
    tiers: dict[str, bytes]


class ShmOffer(msgspec.Struct, frozen=True, kw_only=True):
    """`region_address` is in the peer's own address space; the key turns it into one of ours."""

    worker_address: bytes
    remote_key: bytes
    region_address: int
    region_bytes: int


class UcxOffer(msgspec.Struct, frozen=True, kw_only=True):
    worker_address: bytes
    secret: Secret


class TcpOffer(msgspec.Struct, frozen=True, kw_only=True):
    host: str
    port: int
    secret: Secret


class FetchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Send me these blocks in one message: as many generations as blocks."""

    reservation: Annotated[bytes, msgspec.Meta(max_length=256)]
    blocks: Annotated[list[Word], msgspec.Meta(min_length=1, max_length=MAX_MESSAGE_BLOCKS)]
    generations: Annotated[list[Word], msgspec.Meta(min_length=1, max_length=MAX_MESSAGE_BLOCKS)]


class UcxHello(msgspec.Struct, frozen=True, kw_only=True):
    """A client's own way back, before its first request."""

    client: Identity
    worker_address: Annotated[bytes, msgspec.Meta(max_length=32 << 10)]
    nonce: Secret


class UcxWelcome(msgspec.Struct, frozen=True, kw_only=True):
    nonce: Secret
    server_nonce: Secret


class UcxFetch(msgspec.Struct, frozen=True, kw_only=True):
    """`token` is the header of the reply."""

    client: Identity
    token: Identity
    request: FetchRequest


class UcxBye(msgspec.Struct, frozen=True, kw_only=True):
    client: Identity
    token: Identity


M = TypeVar("M", bound=msgspec.Struct)


def encode(message: msgspec.Struct) -> bytes:
    return msgspec.msgpack.encode(message)


def decode(data: bytes | bytearray, kind: type[M]) -> M:
    """Raises PeerError where the bytes are not such a message."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise PeerError(f"not a {kind.__name__}: {error}") from error


def decode_fetch(data: bytes | bytearray) -> FetchRequest:
    request = decode(data, FetchRequest)
    check_fetch(request)
    return request


def check_fetch(request: FetchRequest) -> None:
    if len(request.blocks) != len(request.generations):
        raise PeerError("a fetch names as many generations as blocks")


def blocks_per_message(layout: KvLayout) -> int:
    """How many blocks a message carries: both sides compute it, so neither takes a size from the other."""
    return max(1, min(MAX_MESSAGE_BLOCKS, MESSAGE_BYTES // layout.block_bytes))
