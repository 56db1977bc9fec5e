"""Bugs that the simulation must find: each takes one rule out of the product's code, as a careless change would.

A bug is a list of (owner, name of a method, what stands there instead); `planted` puts it in and takes it out again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from common.mesh import gateway_streams
from common.mesh.cancel_memory import CancelMemory
from common.mesh.gateway import GatewayCore
from common.mesh.gateway_probes import GatewayProbes
from common.mesh.handoff_desk import HandoffDesk
from common.mesh.owner_watch import OwnerWatch
from common.mesh.receiving_desk import ReceivingDesk
from common.mesh.request_store import RequestStore
from common.mesh.sending_desk import SendingDesk
from common.mesh.worker import WorkerCore
from common.mesh.worker_ledger import WorkerLedger
from common.policy.block_pool import BlockPool
from common.protocol import stored_log
from common.protocol.attempt_floor import AttemptFloors
from common.protocol.handoff_receiver import Receiver
from common.protocol.handoff_sender import BEFORE_LAST, Sender, SenderState, Sending
from common.protocol.messages import Withdraw
from common.protocol.stored_log import StoredChoice
from common.protocol.token_log import SequenceLog
from common.protocol.token_log_backlog import LogPart, TokenLogBacklog
from common.protocol.token_stream import TokenStream
from common.simulation.fault_strength import FaultStrength
from common.simulation.simulated_copies import SimulatedPull
from common.values.tokens import NewTokens

Change = tuple[Any, str, Callable[..., Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bug:
    """`law` is a part of what the simulation says once it has found the bug, in the words of one of its laws. Bugs that need
    rare weather are looked for in that weather."""

    name: str
    changes: tuple[Change, ...]
    law: str
    weather: FaultStrength | None = None


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in bug.changes]
    for owner, name, instead in bug.changes:
        setattr(owner, name, instead)
    try:
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)


def _accept_any_attempt() -> Change:
    original = TokenStream.accept
    return (TokenStream, "accept", lambda stream, attempt, new: original(stream, stream.attempt, new))


def _take_frames_of_any_attempt() -> Change:
    """The gateway reads each entry as if it were of the present attempt."""
    original = GatewayCore.on_frame

    def on_frame(core: GatewayCore, frame: Any, now: float) -> None:
        entries = []
        for entry in frame.entries:
            request = core._ledger.requests.get(entry.request_id)
            entries.append(entry if request is None else msgspec.structs.replace(entry, attempt=request.attempt))
        original(core, msgspec.structs.replace(frame, entries=entries), now)

    return (GatewayCore, "on_frame", on_frame)


def _keep_after_last(sender: Sender) -> Sending:
    """The right to emit went with LAST; this sender takes it back when the connection ends."""
    if sender.state in BEFORE_LAST or sender.state is SenderState.LAST_SENT:
        sender.state = SenderState.KEPT
        return sender._finished()
    return Sending()


def _every_copy_is_good() -> Change:
    original = Receiver.on_pulled
    return (Receiver, "on_pulled", lambda receiver, blocks, outcomes: original(receiver, blocks, ["copied"] * len(blocks)))


def _ignore_withdraw() -> Change:
    original = ReceivingDesk.sender_message

    def sender_message(desk: ReceivingDesk, peer: Any, message: Any, sequence: Any, now: float) -> Any:
        return [] if isinstance(message, Withdraw) else original(desk, peer, message, sequence, now)

    return (ReceivingDesk, "sender_message", sender_message)


def _skip_a_token() -> Change:
    original = SequenceLog.since
    return (SequenceLog, "since", lambda log, index: original(log, index + 1))


def _release_under_a_copy(desk: ReceivingDesk, sequence: Any, receiver: Any) -> Any:
    sequence.receiver = None
    desk._engine.release(sequence.key)
    return [(sequence, "released")]


def _settle_without_revoking() -> Change:
    original = SendingDesk._settled

    def settled(desk: SendingDesk, sequence: Any, outcome: Any) -> Any:
        if sequence.sender is not None:
            sequence.sender.reservation = None
        return original(desk, sequence, outcome)

    return (SendingDesk, "_settled", settled)


def _read_replays(change: Callable[[Any], Any]) -> Change:
    original = GatewayProbes._on_entry

    def on_entry(probes: GatewayProbes, request: Any, worker: Any, entry: Any, *rest: Any) -> None:
        changed = change(entry)
        if changed is not None:
            original(probes, request, worker, changed, *rest)

    return (GatewayProbes, "_on_entry", on_entry)


def _keep_without_siblings(ledger: WorkerLedger, sequence: Any, now: float) -> None:
    sequence.log.state = "running"
    sequence.leaves = False


def _share_what_is_free() -> Change:
    """Blocks are given away twice: the pool forgets that the last one is taken."""
    original = BlockPool.allocate

    def allocate(pool: BlockPool, count: int) -> list[int]:
        blocks = original(pool, count)
        if len(blocks) > 1:
            pool._references[blocks[-1]] = 0
            pool._free.append(blocks[-1])
        return blocks

    return (BlockPool, "allocate", allocate)


def _forget_the_list_rule(desk: HandoffDesk, peer: Any, held: Any, sequences: Any) -> Sequence[Any]:
    return []


def _ignore_cancels_of_the_running(core: WorkerCore, cancel: Any, now: float) -> None:
    core._ledger.floors.cancel(cancel.request_id, cancel.attempt, cancel.choices, now)


def _hear_everybody() -> tuple[Change, Change]:
    """Workers take every cancel and every question for the present owner's."""
    cancel, replay = WorkerCore.on_cancel, WorkerCore.on_replay
    high = 1_000_000
    return (
        (WorkerCore, "on_cancel", lambda core, c, now: cancel(core, msgspec.structs.replace(c, epoch=high), now)),
        (
            WorkerCore,
            "on_replay",
            lambda core, items, *rest: replay(core, [msgspec.structs.replace(item, epoch=high) for item in items], *rest),
        ),
    )


def _extend_over_gaps(segment: StoredChoice, new: NewTokens) -> None:
    segment.tokens.extend(new.tokens)
    segment.logprobs.extend(new.logprobs or [None] * len(new.tokens))
    segment.prompt_logprobs = new.prompt_logprobs if segment.prompt_logprobs is None else segment.prompt_logprobs
    segment.ending = new.ending or segment.ending


def _begin_in_the_middle(backlog: TokenLogBacklog, part: LogPart) -> None:
    part.log.stored_entries = 0
    backlog._new[part.key] = None


async def _write_without_comparing(store: RequestStore, owned: Any, change: Any, *, ttl_s: float) -> bool:
    await store._store.put(store._key(owned), change, ttl_s=ttl_s)
    return True


SILENT_OWNERS = FaultStrength(gateway_freezes=3, impatience=1.0, step_s=0.05)

BUGS = (
    Bug(
        name="no epoch check of cancels",
        changes=_hear_everybody()[:1],
        law="a cancel of an old owner",
        weather=SILENT_OWNERS,
    ),
    Bug(name="no epoch check of questions", changes=_hear_everybody()[1:], law="answers an old owner", weather=SILENT_OWNERS),
    Bug(
        name="an adoption turns no frames",
        changes=((SequenceLog, "take_owner", lambda log, owner: None),),
        law="sends tokens",
        weather=SILENT_OWNERS,
    ),
    Bug(
        name="an owner does not compare before it sets",
        changes=((RequestStore, "_change", _write_without_comparing),),
        law="the record of",
        weather=SILENT_OWNERS,
    ),
    Bug(
        name="a log segment begins in the middle",
        changes=((stored_log, "_extend", _extend_over_gaps), (TokenLogBacklog, "_begin_again", _begin_in_the_middle)),
        law="",
        weather=FaultStrength(gateway_deaths=2, store_outages=3, step_s=0.05),
    ),
    Bug(
        name="lost scores are not missed",
        changes=((gateway_streams, "_lacks_scores", lambda request, stream, new: False),),
        law="log-probabilities of other tokens",
        weather=FaultStrength(deaths=3, gateway_deaths=3, store_outages=4, step_s=0.1),
    ),
    Bug(
        name="a watch that forgets",
        changes=((OwnerWatch, "lost", lambda watch, owners, now: []),),
        law="left behind",
        weather=FaultStrength(gateway_deaths=2, abandonment=1.0, step_s=0.6),
    ),
    Bug(
        name="no attempt filter",
        changes=(_accept_any_attempt(), _take_frames_of_any_attempt()),
        law="tokens of a dead attempt",
        weather=FaultStrength(freezes=3, partitions=3, outages=2, message_loss=0.05, step_s=0.05, message_delay_s=0.02),
    ),
    Bug(
        name="no tombstone",
        changes=((AttemptFloors, "is_stale", lambda floors, key, attempt: False),),
        law="after it was cancelled there",
        weather=FaultStrength(leaving=1.0, message_delay_s=0.05, message_twice=0.3, step_s=0.02, copy_s=0.02),
    ),
    Bug(
        name="no generation check, no checksum",
        changes=((SimulatedPull, "fence_holds", lambda pull, block: True), (SimulatedPull, "sum_holds", lambda pull, block: True)),
        law="holds another content",
    ),
    Bug(name="failed copies count as good", changes=(_every_copy_is_good(),), law="holds another content"),
    Bug(
        name="a lost cancel is not repeated",
        changes=((CancelMemory, "is_due", lambda memory, request, worker, now: False),),
        law="still runs",
        weather=FaultStrength(leaving=1.0, message_loss=0.2, outages=2, step_s=0.12),
    ),
    Bug(
        name="a cancel stops nothing",
        changes=((WorkerCore, "on_cancel", _ignore_cancels_of_the_running),),
        law="after it was cancelled",
    ),
    Bug(name="the sender emits after LAST", changes=((Sender, "on_peer_lost", _keep_after_last),), law="is next"),
    Bug(
        name="WITHDRAW leaks the reservation",
        changes=(_ignore_withdraw(), (HandoffDesk, "held", _forget_the_list_rule)),
        law="never quiet",
        weather=FaultStrength(leaving=1.0, message_loss=0.2, step_s=0.03, copy_s=0.1, seal_s=0.03),
    ),
    Bug(name="a replay skips a token", changes=(_skip_a_token(),), law="never quiet"),
    Bug(name="a landing is freed under a copy", changes=((ReceivingDesk, "_release", _release_under_a_copy),), law="a "),
    Bug(name="a grant outlives its hand-off", changes=(_settle_without_revoking(),), law="still grants"),
    Bug(
        name="unknown is ignored",
        changes=(_read_replays(lambda entry: None if entry.state == "unknown" else entry),),
        law="never quiet",
    ),
    Bug(
        name="moved is not followed",
        changes=(_read_replays(lambda entry: msgspec.structs.replace(entry, moved_to=None)),),
        law="never quiet",
    ),
    Bug(
        name="choices of a request decode anywhere",
        changes=((WorkerLedger, "_keep", _keep_without_siblings),),
        law="of which others decode at",
    ),
    Bug(name="a block has two owners", changes=(_share_what_is_free(),), law=""),
)
