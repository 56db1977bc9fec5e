"""Which workers take a request, in predicted seconds. Pure: outlooks in, a placement out.

Whoever plays a role is asked first; free placement asks whether a prompt is better off on its decode worker, beside the streams
there, and whether a request may stay and decode where it is prefilled. If no live worker of a role is left, any live worker
takes that phase.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from common.policy.placement import ALIKE, Draws, PlacementRule, choose_site
from common.policy.site_questions import PlacedRequest, goes_beside, prompt_seconds, stays_here, stream_seconds
from common.policy.worker_outlook import STEP_TOKENS, PendingLoad, WorkerOutlook
from common.values.ids import WorkerId
from common.values.worker import WorkerSnapshot

PlacementKind = Literal["split", "colocated", "beside", "stays", "one_token", "alone"]
"""Over two workers; on a colocated one; on a decode worker beside its streams; on a prefill worker that keeps it; it ends with its
prompt; whoever is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRules:
    """`free`: roles are preferences. The rules but the first are baselines."""

    rule: PlacementRule = "least_seconds"
    free: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What baselines choose by instead of seconds."""

    number: int
    draws: Draws


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """`decode` is None where `worker` runs the request alone. Predicted: `prompt_s` until the prompt is computed, `transfer_s` of
    the hand-off, `stream_s` a token on the worker that decodes, which is `stream`."""

    worker: WorkerId
    decode: WorkerId | None
    kind: PlacementKind
    prompt_s: float
    transfer_s: float
    stream_s: float
    prompt: WorkerOutlook
    stream: WorkerOutlook

    @property
    def until_second_token_s(self) -> float:
        """What placements are compared by."""
        return self.prompt_s + self.transfer_s + self.stream_s


def place(
    outlooks: Sequence[WorkerOutlook],
    request: PlacedRequest,
    turn: Turn,
    *,
    needs_decode: bool,
    rules: PlacementRules,
    avoid: Collection[WorkerId] = (),
    prompts_asked: float = 0.0,
) -> Placement | None:
    """None where nobody is ready.

    `needs_decode` is False for requests that end with their first token. `avoid` names workers that just refused or were lost; they
    are used only if no others remain. `prompts_asked`: the share of the prefill workers' time that prompts have wanted lately.
    """
    ready = sorted((o for o in outlooks if o.snapshot.state == "ready"), key=lambda o: o.worker)
    live = [o for o in ready if o.worker not in avoid] or ready
    if not live:
        return None
    seconds = {o.worker: stream_seconds(o.time, o.load, request, room_tokens=o.room_tokens) for o in live}
    decodes = sorted((o for o in live if o.snapshot.role == "decode"), key=lambda o: (seconds[o.worker], -o.cached, o.worker))
    decodes = _spread(decodes, seconds)
    candidates: list[Placement] = []
    for prompt in live:
        if prompt.snapshot.role == "both":
            candidates.append(_alone(prompt, request, "colocated", seconds))
        elif prompt.snapshot.role == "prefill" and not needs_decode:
            candidates.append(_alone(prompt, request, "one_token", seconds))
        elif prompt.snapshot.role == "prefill":
            partner = _partner(prompt, decodes, seconds, rules, turn)
            if partner is not None:
                candidates.append(_split(prompt, partner, request, seconds))
    if not candidates:
        return min((_alone(outlook, request, "alone", seconds) for outlook in live), key=lambda site: site.until_second_token_s)
    chosen = choose_site(
        rules.rule,
        len(candidates),
        cost=lambda index: candidates[index].until_second_token_s,
        waiting=lambda index: candidates[index].prompt.waiting,
        turn=turn.number,
        draws=turn.draws,
    )
    site = candidates[chosen]
    if rules.free and site.decode is not None:
        return _freely(site, request, seconds, prompts_asked)
    return site


def _spread(decodes: Sequence[WorkerOutlook], seconds: Mapping[WorkerId, float]) -> list[WorkerOutlook]:
    """Those in the order of their seconds, but of those like the best the one with fewest requests first."""
    if not decodes:
        return []
    near = ALIKE * seconds[decodes[0].worker]
    alike = sum(seconds[o.worker] <= near for o in decodes)
    return [*sorted(decodes[:alike], key=lambda o: (o.waiting, -o.cached)), *decodes[alike:]]


def _partner(
    prompt: WorkerOutlook, decodes: Sequence[WorkerOutlook], seconds: Mapping[WorkerId, float], rules: PlacementRules, turn: Turn
) -> WorkerOutlook | None:
    """Of the decode workers that it can pair with; `decodes` are in the order of preference."""
    pairing = (o for o in decodes if o.worker in prompt.snapshot.peers)
    if rules.rule == "least_seconds":
        return next(pairing, None)
    partners = list(pairing)
    if not partners:
        return None
    chosen = choose_site(
        rules.rule,
        len(partners),
        cost=lambda index: seconds[partners[index].worker],
        waiting=lambda index: partners[index].waiting,
        turn=turn.number,
        draws=turn.draws,
    )
    return partners[chosen]


def _split(prompt: WorkerOutlook, stream: WorkerOutlook, request: PlacedRequest, seconds: Mapping[WorkerId, float]) -> Placement:
    return Placement(
        worker=prompt.worker,
        decode=stream.worker,
        kind="split",
        prompt_s=_prompt_s(prompt, request),
        transfer_s=prompt.transfer_s(request.prompt_tokens),
        stream_s=seconds[stream.worker],
        prompt=prompt,
        stream=stream,
    )


def _alone(outlook: WorkerOutlook, request: PlacedRequest, kind: PlacementKind, seconds: Mapping[WorkerId, float]) -> Placement:
    return Placement(
        worker=outlook.worker,
        decode=None,
        kind=kind,
        prompt_s=_prompt_s(outlook, request),
        transfer_s=0.0,
        stream_s=seconds[outlook.worker],
        prompt=outlook,
        stream=outlook,
    )


def _freely(site: Placement, request: PlacedRequest, seconds: Mapping[WorkerId, float], prompts_asked: float) -> Placement:
    """The same two workers, or one of them alone where that is better."""
    stream, prompt = site.stream, site.prompt
    is_beside = goes_beside(
        stream.time,
        stream.load,
        request,
        cached=stream.cached,
        step_tokens=STEP_TOKENS,
        elsewhere_s=site.prompt_s + site.transfer_s,
        room_tokens=stream.room_tokens,
    )
    if is_beside:
        return _alone(stream, request, "beside", seconds)
    is_staying = stays_here(
        prompt.time,
        prompt.load,
        request,
        there_s=site.stream_s,
        transfer_s=site.transfer_s,
        room_tokens=prompt.room_tokens,
        prompts_wait=prompt.load.queue_s > 0.0,
        prompts_asked=prompts_asked,
    )
    return _alone(prompt, request, "stays", seconds) if is_staying else site


def _prompt_s(outlook: WorkerOutlook, request: PlacedRequest) -> float:
    return prompt_seconds(
        outlook.time,
        outlook.load,
        tokens=request.prompt_tokens,
        cached=outlook.cached,
        step_tokens=STEP_TOKENS,
        mixes=outlook.mixes,
    )


def decode_wait(worker: WorkerSnapshot, pending: Mapping[WorkerId, PendingLoad]) -> float:
    """Grows with the sequences that share the worker's steps, steeply once its blocks or places are used up."""
    extra = pending.get(worker.worker, PendingLoad())
    sequences = worker.running + worker.waiting + extra.sequences
    per_step = worker.seconds_per_step or 1e-2
    full = sequences >= worker.max_num_seqs or worker.blocks_free + worker.blocks_cached == 0
    return sequences * per_step * (10.0 if full else 1.0)
