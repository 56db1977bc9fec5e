"""What the gateway's core asks its shell to do. Dispatches and replays are answered by events."""

from dataclasses import dataclass

import msgspec

from common.protocol.messages import Cancel, Dispatch, ReplayItem
from common.values.errors import SegueError
from common.values.ids import RequestId, WorkerId
from common.values.request_account import RequestAccount
from common.values.tokens import NewTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class SendDispatch:
    """Answer with `on_dispatch_answer`, also where none came in time. The request record shows the new attempt first. `kind` of
    placement: why these workers."""

    worker: WorkerId
    dispatch: Dispatch
    within_s: float
    kind: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SendCancel:
    worker: WorkerId
    cancel: Cancel


@dataclass(frozen=True, slots=True, kw_only=True)
class SendReplay:
    """Answer with `on_replay_answer`, also where none came in time."""

    worker: WorkerId
    items: tuple[ReplayItem, ...]
    within_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A worker has the request."""

    request_id: RequestId


class Deliver(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens for the client, in order and once."""

    request_id: RequestId
    choice: int
    new: NewTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The request's one ending: every choice has ended (`error` None), or it failed. Its account, where it was ever placed."""

    request_id: RequestId
    error: SegueError | None = None
    account: RequestAccount | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AskCache:
    """What the worker's prefix cache holds is not known here any more. No answer but its next snapshots."""

    worker: WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """Another gateway has taken the request over: its end is no longer ours to record, its sequences not ours to cancel."""

    request_id: RequestId


GatewayEffect = SendDispatch | SendCancel | SendReplay | AskCache | Accepted | Deliver | Ended | Dropped
