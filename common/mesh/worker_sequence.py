"""The record of one sequence at a worker: which attempt, for whom, and where its hand-off stands."""

from dataclasses import dataclass, field
from typing import Literal

from common.mesh.engine_values import SequenceJob
from common.protocol.handoff_receiver import Receiver
from common.protocol.handoff_sender import Sender
from common.protocol.messages import ReadyBlock
from common.protocol.token_log import SequenceLog
from common.values.ids import SequenceKey, WorkerId

Settlement = Literal["moved", "kept", "dropped", "running", "released"]
"""How a hand-off ended: for its sender `moved`, `kept` (decoded here) or `dropped`; for its receiver `running` or `released`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenOver:
    """LAST came `at` that moment: the stream had then stood for `held_s` since its newest token, `spent_s` since its first."""

    at: float
    held_s: float
    spent_s: float


@dataclass(slots=True, kw_only=True, eq=False)
class WorkerSequence:
    """`peer` is the other side of a hand-off that is planned or under way, None where the sequence runs here alone.

    `leader` is the choice whose prompt this one shares: it is handed off first, so that the receiver knows the blocks.
    While it `leaves` a worker that takes no new work, `peer` is where to; `tried` are all that it was offered to. Seals of an
    earlier `seal_round` than its present hand-off are void.
    A `suspect` was recovered from a lost worker; it is one until the worker that decodes it makes a token.
    Blocks that were sealed before there is an offer wait in `sealed`. Who `waited_for_room` at the peer tells nothing of how
    long a transfer takes. What is `displaced` belongs to a role that the worker has given up: it moves where it can.
    """

    key: SequenceKey
    attempt: int
    job: SequenceJob
    log: SequenceLog
    peer: WorkerId | None = None
    leader: SequenceKey | None = None
    sender: Sender | None = None
    receiver: Receiver | None = None
    offer_index: int = 0
    deadline: float | None = None
    leaves: bool = False
    tried: set[WorkerId] = field(default_factory=set)
    seal_round: int = 0
    suspect: bool = False
    awaits_offer: bool = False
    last_token_at: float | None = None
    waited_for_room: bool = False
    taken_over: TakenOver | None = None
    displaced: bool = False
    sealed: list[ReadyBlock] = field(default_factory=list)
    sealed_all: bool = False


Settled = list[tuple[WorkerSequence, Settlement]]
"""What an event has settled."""
