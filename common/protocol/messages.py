"""Every message of the mesh. msgpack on the wire, types checked strictly, unknown fields ignored, sizes bounded.

Each message carries the wire version `v`; release N understands N-1 and N+1, so fields are only ever added, with defaults.
Deadlines are remaining seconds: clocks are never compared between hosts. Prompt ids travel as little-endian int32 bytes.
"""

import array
import sys
from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

import msgspec

from common.protocol.wire_version import WIRE_VERSION, check_version, check_version_of
from common.values.cache_page import CachePage
from common.values.errors import PeerError, RequestError
from common.values.ids import ModelKey
from common.values.kv_layout import Fingerprint
from common.values.sampling import SamplingParameters
from common.values.tokens import NewTokens
from common.values.worker import Role, WorkerSnapshot

MAX_CHOICES = 128
MAX_ENTRIES = 8192
MAX_SEEN = 64

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class Wire(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """The base of all: the version of the sender."""

    v: int = WIRE_VERSION


# ---------------------------------------------------------------------------------------- gateway → worker (inbox)


class ChoiceState(msgspec.Struct, frozen=True, kw_only=True):
    """An unfinished choice and the tokens it has so far."""

    choice: Annotated[int, msgspec.Meta(ge=0, lt=MAX_CHOICES)]
    tokens: list[int] = []


class Dispatch(Wire, frozen=True, kw_only=True, tag="dispatch"):
    """Place a request: prefill here, then hand over to `decode_worker`, or run it here where that is None.

    `prompt` is None for a prompt that would pass the broker's message limit: the worker reads it in the request record.
    `salt` separates the prefix caches of tenants. `remaining_s` bounds the whole request. `epoch` rises with every change of
    the request's gateway. A `suspect` was recovered from a lost worker: it is announced before it is run, one at a time. What was
    `accepted_before` by a worker is promised an end: it may pass the bound of the queue, itself within a bound.

    Objectives order the work and never its results: `ttft_left_s` until the first token is late, `tpot_s` between later ones.
    `best_effort` was admitted without a promise; `gives_way` is of a key that has had more than its share. `expected_tokens`:
    predicted length of the answer.
    """

    request_id: Name
    attempt: Count
    gateway: Name
    incarnation: Name
    epoch: Count = 1
    model: ModelKey
    prompt: bytes | None
    choices: Annotated[list[ChoiceState], msgspec.Meta(min_length=1, max_length=MAX_CHOICES)]
    sampling: SamplingParameters
    decode_worker: str | None = None
    salt: bytes = b""
    remaining_s: float | None = None
    suspect: bool = False
    ttft_left_s: float | None = None
    tpot_s: float | None = None
    best_effort: bool = False
    gives_way: bool = False
    expected_tokens: Count | None = None
    accepted_before: bool = False


class Cancel(Wire, frozen=True, kw_only=True, tag="cancel"):
    """End these choices (all where None) up to this attempt, wherever they are; refuse them if they come later. Ignored
    where a gateway of a higher epoch has taken the request over."""

    request_id: Name
    attempt: Count
    choices: list[int] | None = None
    epoch: Count = 1


class TellCache(Wire, frozen=True, kw_only=True, tag="tell_cache"):
    """A page of the worker's prefix cache was missed: its next snapshots tell the whole set."""


class RoleChange(Wire, frozen=True, kw_only=True, tag="role_change"):
    """Take this role while serving, weights resident: what comes is served by it, what runs moves or ends here. The worker's next
    snapshots say so. A `decision` that is not above the one it took last is ignored."""

    role: Role
    decision: Count


InboxMessage = Dispatch | Cancel | TellCache | RoleChange


DispatchVerdict = Literal["accepted", "full", "stale", "refused"]


class DispatchReply(Wire, frozen=True, kw_only=True):
    """`full`: no place in the queue, try another worker. `refused` carries an error for the client."""

    request_id: Name
    attempt: Count
    verdict: DispatchVerdict
    code: str = ""
    message: str = ""


# ---------------------------------------------------------------------------------------- worker → gateway


class StageSeconds(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How long a sequence was in each stage at one worker, by that worker's own clock; None where it was not in it there.
    `transfer_s` is what is left of the transfer after the first token, the sender's part of it included."""

    prefill_queue_s: float | None = None
    prefill_s: float | None = None
    transfer_s: float | None = None
    decode_queue_s: float | None = None


class FrameEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`stages` come with the first token that the worker itself makes of the sequence."""

    request_id: str
    choice: int
    attempt: int
    new: NewTokens
    stages: StageSeconds | None = None


NoticeKind = Literal["suspect", "cleared", "moved", "handed_back"]


class SequenceNotice(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway should know of a sequence before its next token. `suspect`: the worker is about to run it, alone among
    suspects; `cleared`: it does so no more, without a token. `moved`: it was handed to `moved_to`. `handed_back`: the worker has
    dropped it, place it again: it drains, or choices of the same request decode at `moved_to`."""

    request_id: str
    choice: int
    attempt: int
    kind: NoticeKind
    moved_to: str | None = None


class TokenFrame(Wire, frozen=True, kw_only=True):
    """All new tokens of one step for one gateway, or notices about sequences of its."""

    worker: Name
    incarnation: Name
    entries: Annotated[list[FrameEntry], msgspec.Meta(max_length=MAX_ENTRIES)]
    notices: Annotated[list[SequenceNotice], msgspec.Meta(max_length=MAX_ENTRIES)] = []


class ReplayItem(msgspec.Struct, frozen=True, kw_only=True):
    request_id: str
    choice: int
    attempt: int
    next_index: Count
    epoch: Count = 1


class ReplayRequest(Wire, frozen=True, kw_only=True):
    """Asks for missing tokens and for the state of sequences. From a higher epoch than the worker knows it is an adoption
    as well: frames go to `gateway` from then on."""

    items: Annotated[list[ReplayItem], msgspec.Meta(max_length=MAX_ENTRIES)]
    gateway: str = ""
    incarnation: str = ""


SequenceState = Literal["queued", "running", "preempted", "moved", "ended", "unknown", "adopted"]


class ReplayEntry(msgspec.Struct, frozen=True, kw_only=True):
    """`new` holds the tokens from the asked index on. `moved_to` names the worker for state `moved`. `adopted`: a gateway of
    a higher epoch owns the request, the asker drops it."""

    request_id: str
    choice: int
    attempt: int
    state: SequenceState
    new: NewTokens | None = None
    moved_to: str | None = None


class ReplayReply(Wire, frozen=True, kw_only=True):
    """`more` says that the answer was cut at the message limit: ask again for what is missing."""

    worker: Name
    incarnation: Name
    entries: list[ReplayEntry]
    more: bool = False


class Snapshot(Wire, frozen=True, kw_only=True):
    """`gone` is a worker's farewell: it serves no more. `cache` says what its prefix cache gained and lost: names of full
    blocks, 16 bytes each, in numbered pages. Who misses a number asks for the whole set (`tell_cache`); a page with `restart`
    begins it."""

    snapshot: WorkerSnapshot
    gone: bool = False
    cache: CachePage | None = None


class GatewayBeat(Wire, frozen=True, kw_only=True):
    """Each second: the gateway lives. Workers end the sequences of one that has fallen silent for good."""

    gateway: Name
    incarnation: Name


# ---------------------------------------------------------------------------------------- gateway → planners → all


class SeenArrival(msgspec.Struct, frozen=True, kw_only=True):
    """A request as it came: `output_tokens` as predicted then, its objectives in seconds."""

    prompt_tokens: Annotated[int, msgspec.Meta(ge=1)]
    output_tokens: Annotated[int, msgspec.Meta(ge=1)]
    ttft_s: float
    tpot_s: float


class ModelArrivals(msgspec.Struct, frozen=True, kw_only=True):
    """`arrived` requests of the model since the gateway began, refused ones included; `seen` are the last ones since the message
    before."""

    model: ModelKey
    arrived: Count
    seen: Annotated[list[SeenArrival], msgspec.Meta(max_length=MAX_SEEN)] = []


class GatewayLoad(Wire, frozen=True, kw_only=True):
    """Each second: what was asked of a gateway. `free`: it places freely, so that roles are preferences."""

    gateway: Name
    incarnation: Name
    models: list[ModelArrivals]
    free: bool = False


class Decision(Wire, frozen=True, kw_only=True):
    """What a planner decided, and why. `acting`: it sent `role` to `worker` (both None: everything stays), as role change
    `change`. `rate` is the forecast of requests a second, `pressure_prefill` and `pressure_decode` what is asked of the phases by
    what they can do, `gain` the share of requests that become good by it, by trial."""

    planner: Name
    number: Count
    model: ModelKey
    acting: bool
    reason: str
    worker: str | None = None
    role: Role | None = None
    change: Count = 0
    rate: float = 0.0
    pressure_prefill: float = 0.0
    pressure_decode: float = 0.0
    gain: float | None = None


# ---------------------------------------------------------------------------------------- worker ↔ worker (control)


class Hello(Wire, frozen=True, kw_only=True, tag="hello"):
    """First message on a control connection, from both sides."""

    worker: Name
    incarnation: Name
    model: ModelKey
    fingerprint: Fingerprint
    transport: bytes


class Offer(Wire, frozen=True, kw_only=True, tag="offer"):
    """P → D, when the first chunk is sealed. `number` makes answers to an older offer recognisable.

    `prompt` and `choice` are the dispatch's, so that D can prefill what it cannot copy. `positions` is the number of
    positions whose KV will be handed over. `tpot_s`, `best_effort`, `gives_way` and `expected_tokens` are the dispatch's too;
    `spent_s` seconds have passed since the first token of a stream that is moved.
    """

    request_id: Name
    choice: int
    attempt: Count
    number: Count
    gateway: Name
    gateway_incarnation: str = ""
    epoch: Count = 1
    prompt: bytes
    tokens: list[int]
    sampling: SamplingParameters
    positions: Count
    salt: bytes = b""
    remaining_s: float | None = None
    suspect: bool = False
    tpot_s: float | None = None
    spent_s: float = 0.0
    best_effort: bool = False
    gives_way: bool = False
    expected_tokens: Count | None = None


class Accept(Wire, frozen=True, kw_only=True, tag="accept"):
    """D → P: room is reserved; send blocks from index `first_block` on (what lies before is known here)."""

    request_id: Name
    choice: int
    attempt: Count
    number: Count
    first_block: Count
    reservation: bytes


class Busy(Wire, frozen=True, kw_only=True, tag="busy"):
    """D → P: queued here; an accept follows when there is room."""

    request_id: Name
    choice: int
    attempt: Count
    number: Count


RefuseReason = Literal["stale", "full", "draining", "never_fits", "mismatch"]


class Refuse(Wire, frozen=True, kw_only=True, tag="refuse"):
    """D → P. `stale`: a newer attempt or a cancel is known, drop the sequence. Others: decode it yourself."""

    request_id: Name
    choice: int
    attempt: Count
    number: Count
    reason: RefuseReason


class ReadyBlock(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    index: Count
    block: Count
    generation: Count
    checksum: bytes


class Ready(Wire, frozen=True, kw_only=True, tag="ready"):
    """P → D after each chunk: these blocks are sealed and may be copied."""

    request_id: Name
    choice: int
    attempt: Count
    number: Count
    reservation: bytes
    blocks: list[ReadyBlock]


class Last(Wire, frozen=True, kw_only=True, tag="last"):
    """P → D: the right to emit. `new` holds all tokens so far from index 0 on, with their log-probabilities; `spent_s` seconds
    have passed since the first of them, `held_s` since the last."""

    request_id: Name
    choice: int
    attempt: Count
    number: Count
    reservation: bytes
    new: NewTokens
    spent_s: float = 0.0
    held_s: float = 0.0


class Ack(Wire, frozen=True, kw_only=True, tag="ack"):
    """D → P: all is here and verified; P's blocks become evictable cache."""

    request_id: Name
    choice: int
    attempt: Count
    reservation: bytes


class Withdraw(Wire, frozen=True, kw_only=True, tag="withdraw"):
    """P → D before LAST: the sequence has ended, was cancelled or stays here; release the reservation."""

    request_id: Name
    choice: int
    attempt: Count
    number: Count


class ForwardedCancel(Wire, frozen=True, kw_only=True, tag="forwarded_cancel"):
    """P → D after LAST: a cancel reached the sender. `epoch` is the cancel's."""

    request_id: Name
    choice: int
    attempt: Count
    epoch: Count = 1


class HeldSequence(msgspec.Struct, frozen=True, array_like=True):
    """`number` is the offer's; `sending` says which side the lister is on."""

    request_id: str
    choice: int
    attempt: int
    number: int
    sending: bool


class Held(Wire, frozen=True, kw_only=True, tag="held"):
    """Each second, both ways: all that the sender of this message holds with the peer, after having handled `seen`
    messages of the peer on this connection. What the peer had sent before that and is not listed is dropped there."""

    seen: Count
    sequences: Annotated[list[HeldSequence], msgspec.Meta(max_length=MAX_ENTRIES)]


ControlMessage = Hello | Offer | Accept | Busy | Refuse | Ready | Last | Ack | Withdraw | ForwardedCancel | Held
SenderMessage = Ready | Last | Withdraw
ReceiverMessage = Accept | Busy | Refuse | Ack
HandoffMessage = Offer | Accept | Busy | Refuse | Ready | Last | Ack | Withdraw | ForwardedCancel

# ---------------------------------------------------------------------------------------- codec

T = TypeVar("T", bound=Wire)
_encoder = msgspec.msgpack.Encoder()
_inbox: "msgspec.msgpack.Decoder[InboxMessage]" = msgspec.msgpack.Decoder(InboxMessage)
_control: "msgspec.msgpack.Decoder[ControlMessage]" = msgspec.msgpack.Decoder(ControlMessage)
_dispatch_reply = msgspec.msgpack.Decoder(DispatchReply)
_token_frame = msgspec.msgpack.Decoder(TokenFrame)
_replay_request = msgspec.msgpack.Decoder(ReplayRequest)
_replay_reply = msgspec.msgpack.Decoder(ReplayReply)
_snapshot = msgspec.msgpack.Decoder(Snapshot)
_gateway_beat = msgspec.msgpack.Decoder(GatewayBeat)
_gateway_load = msgspec.msgpack.Decoder(GatewayLoad)
_decision = msgspec.msgpack.Decoder(Decision)


def encode(message: msgspec.Struct) -> bytes:
    return _encoder.encode(message)


def decode_inbox(payload: bytes) -> InboxMessage:
    return _decode(_inbox, payload)


def decode_control(payload: bytes) -> ControlMessage:
    return _decode(_control, payload)


def decode_dispatch_reply(payload: bytes) -> DispatchReply:
    return _decode(_dispatch_reply, payload)


def decode_token_frame(payload: bytes) -> TokenFrame:
    return _decode(_token_frame, payload)


def decode_replay_request(payload: bytes) -> ReplayRequest:
    return _decode(_replay_request, payload)


def decode_replay_reply(payload: bytes) -> ReplayReply:
    return _decode(_replay_reply, payload)


def decode_snapshot(payload: bytes) -> Snapshot:
    return _decode(_snapshot, payload)


def decode_gateway_beat(payload: bytes) -> GatewayBeat:
    return _decode(_gateway_beat, payload)


def decode_gateway_load(payload: bytes) -> GatewayLoad:
    return _decode(_gateway_load, payload)


def decode_decision(payload: bytes) -> Decision:
    return _decode(_decision, payload)


def _decode(decoder: "msgspec.msgpack.Decoder[T]", payload: bytes) -> T:
    try:
        message = decoder.decode(payload)
    except (msgspec.DecodeError, RequestError, ValueError, TypeError, RecursionError) as error:
        check_version_of(payload)
        raise PeerError(f"malformed message: {error}") from error
    check_version(message.v)
    return message


def pack_ids(ids: Sequence[int]) -> bytes:
    packed = array.array("i", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_ids(data: bytes) -> tuple[int, ...]:
    if len(data) % 4:
        raise PeerError(f"token ids come in 4 bytes each, got {len(data)} bytes")
    ids = array.array("i")
    ids.frombytes(data)
    if sys.byteorder == "big":
        ids.byteswap()
    return tuple(ids)
