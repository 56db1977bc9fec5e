"""What is under way between a gateway and its workers: in order per sender and receiver, late, and sometimes lost."""

from collections import deque
from dataclasses import dataclass, field

from common.protocol.messages import Cancel, Dispatch, DispatchReply, ReplayEntry, ReplayItem, Snapshot, TokenFrame
from common.values.ids import RequestId, WorkerId


@dataclass(slots=True, kw_only=True, eq=False)
class Question:
    """A dispatch or a replay that the gateway's shell awaits an answer to, until `due`. Only the first answer counts."""

    worker: WorkerId
    due: float
    dispatch: Dispatch | None = None
    items: tuple[ReplayItem, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    question: Question
    reply: DispatchReply | None = None
    entries: tuple[ReplayEntry, ...] | None = None
    incarnation: str = ""


ToWorker = Question | Cancel
ToGateway = Answer | TokenFrame | Snapshot


@dataclass(slots=True, kw_only=True)
class Mailbox:
    """Between the gateway and one worker, as (time of sending, message): one broker connection orders each direction."""

    to_worker: deque[tuple[float, ToWorker]] = field(default_factory=deque)
    to_gateway: deque[tuple[float, ToGateway]] = field(default_factory=deque)


@dataclass(slots=True, kw_only=True)
class Client:
    """What the client of one request has seen: tokens per choice, and at most one end."""

    request_id: RequestId
    prompt: tuple[int, ...]
    expected: dict[int, list[int]]
    tokens: dict[int, list[int]]
    ended_choices: set[int] = field(default_factory=set)
    cancelled_choices: set[int] = field(default_factory=set)
    cancelled: bool = False
    accepted: bool = False
    ends: int = 0
    error: Exception | None = None
    poison_at: int | None = None
    killed: int = 0
    dispatches: int = 0
