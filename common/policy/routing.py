"""Which workers take a request. Pure: snapshots in, a placement out.

Load is estimated in seconds where a worker has measured its steps, else in tokens. The gateway adds its own dispatches
that no snapshot shows yet, so that a burst between two snapshots is spread.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from common.values.ids import WorkerId
from common.values.worker import WorkerSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """`decode` is None where `worker` runs the request alone."""

    worker: WorkerId
    decode: WorkerId | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingLoad:
    """Dispatched to a worker, not yet in its snapshots."""

    sequences: int = 0
    tokens: int = 0


def place(
    snapshots: Sequence[WorkerSnapshot],
    pending: Mapping[WorkerId, PendingLoad],
    *,
    prompt_tokens: int,
    needs_decode: bool,
    avoid: Iterable[WorkerId] = (),
    cached: Mapping[WorkerId, int] | None = None,
) -> Placement | None:
    """The least loaded prefill worker and a decode worker that it can pair with; a colocated worker where that is less
    loaded; None where nobody is ready.

    `needs_decode` is False for requests that end with their first token. If no live worker of a role is left, any live
    worker takes that phase. `avoid` names workers that just refused or were lost; they are used only if no others remain.
    `cached` says how many tokens of the prompt a worker holds in its prefix cache: a prefill worker computes only the rest, and
    among decode workers alike the one that holds more has less to copy.
    """
    avoided = set(avoid)
    known = cached or {}

    def prefill(worker: WorkerSnapshot) -> float:
        return prefill_wait(worker, pending, prompt_tokens - known.get(worker.worker, 0))

    ready = [s for s in snapshots if s.state == "ready"]
    live = [s for s in ready if s.worker not in avoided] or ready
    if not live:
        return None
    choices: list[tuple[float, str, Placement]] = []
    prefills = [s for s in live if s.role == "prefill"]
    decodes = [s for s in live if s.role == "decode"]
    for worker in (s for s in live if s.role == "both"):
        cost = prefill(worker) + decode_wait(worker, pending)
        choices.append((cost, worker.worker, Placement(worker=worker.worker, decode=None)))
    for worker in prefills:
        cost = prefill(worker)
        if not needs_decode:
            choices.append((cost, worker.worker, Placement(worker=worker.worker, decode=None)))
            continue
        partners = [d for d in decodes if d.worker in worker.peers]
        if partners:
            partner = min(partners, key=lambda d: (decode_wait(d, pending), -known.get(d.worker, 0), d.worker))
            placement = Placement(worker=worker.worker, decode=partner.worker)
            choices.append((cost + decode_wait(partner, pending), worker.worker, placement))
    if not choices:
        alone = min(live, key=lambda s: (prefill(s) + decode_wait(s, pending), s.worker))
        return Placement(worker=alone.worker, decode=None)
    return min(choices, key=lambda choice: choice[:2])[2]


def prefill_wait(worker: WorkerSnapshot, pending: Mapping[WorkerId, PendingLoad], tokens: int) -> float:
    """Predicted seconds until that many tokens more are computed there."""
    queued = worker.queued_tokens + pending.get(worker.worker, PendingLoad()).tokens
    per_token = worker.seconds_per_prefill_token or 1e-3
    return (queued + tokens) * per_token


def decode_wait(worker: WorkerSnapshot, pending: Mapping[WorkerId, PendingLoad]) -> float:
    """Grows with the sequences that share the worker's steps, steeply once its blocks or places are used up."""
    extra = pending.get(worker.worker, PendingLoad())
    sequences = worker.running + worker.waiting + extra.sequences
    per_step = worker.seconds_per_step or 1e-2
    full = sequences >= worker.max_num_seqs or worker.blocks_free + worker.blocks_cached == 0
    return sequences * per_step * (10.0 if full else 1.0)
