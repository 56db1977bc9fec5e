"""How a request's sequences come to a worker: dispatched by their gateway, or offered by a peer."""

import math

from common.mesh.engine_values import Promise, SequenceJob
from common.mesh.evacuation import Evacuation
from common.mesh.handoff_desk import HandoffDesk
from common.mesh.intake import Intake
from common.mesh.sequence_engine import SequenceEngine
from common.mesh.worker_ledger import WorkerLedger
from common.mesh.worker_sequence import WorkerSequence
from common.protocol.handoff_receiver import Receiver, refuse
from common.protocol.messages import ChoiceState, Dispatch, DispatchVerdict, Offer, RefuseReason, unpack_ids
from common.protocol.token_log import SequenceLog
from common.values.ids import GatewayId, Incarnation, Owner, RequestId, SequenceKey, WorkerId


class Placing:
    """One per worker."""

    def __init__(
        self,
        worker: WorkerId,
        engine: SequenceEngine,
        intake: Intake,
        ledger: WorkerLedger,
        desk: HandoffDesk,
        evacuation: Evacuation,
    ) -> None:
        self._worker = worker
        self._engine = engine
        self._intake = intake
        self._ledger = ledger
        self._desk = desk
        self._evacuation = evacuation

    def judge(self, dispatch: Dispatch, prompt: tuple[int, ...]) -> tuple[DispatchVerdict, str, str]:
        refusal = self._intake.refusal(dispatch, prompt)
        if refusal is not None:
            return "refused", refusal.code, refusal.message
        keys = [SequenceKey(RequestId(dispatch.request_id), state.choice) for state in dispatch.choices]
        if any(self._ledger.is_stale(key, dispatch.attempt) or self._ledger.has_newer_owner(key, dispatch.epoch) for key in keys):
            return "stale", "", ""
        if all(self._ledger.is_known(key, dispatch.attempt) for key in keys):
            return "accepted", "", ""
        if self._evacuation.leaving or not self._engine.has_room_to_queue(len(keys), accepted_before=dispatch.accepted_before):
            return "full", "", ""
        return "accepted", "", ""

    def place(
        self,
        key: SequenceKey,
        state: ChoiceState,
        dispatch: Dispatch,
        prompt: tuple[int, ...],
        leader: SequenceKey | None,
        now: float,
    ) -> None:
        self._ledger.admit(key, dispatch.attempt, now)
        target = WorkerId(dispatch.decode_worker) if dispatch.decode_worker else None
        one_more_ends_it = len(state.tokens) + 1 >= dispatch.sampling.max_tokens
        hand_off = target not in (None, self._worker) and not one_more_ends_it and target in self._desk.post.peers
        job = SequenceJob(
            key=key,
            prompt=prompt,
            given=tuple(state.tokens),
            sampling=dispatch.sampling,
            salt=dispatch.salt,
            hand_off=hand_off,
            after=None if state.tokens else leader,
            suspect=dispatch.suspect,
            accepted_before=dispatch.accepted_before,
            promise=_promise(dispatch, now),
        )
        self._engine.submit(job, now)
        log = SequenceLog(owner=owner_of(dispatch), attempt=dispatch.attempt, given=len(state.tokens), tokens=list(state.tokens))
        self._ledger.sequences[key] = WorkerSequence(
            key=key,
            attempt=dispatch.attempt,
            job=job,
            log=self._ledger.logs.open(key, log),
            peer=target if hand_off else None,
            leader=job.after,
            deadline=None if dispatch.remaining_s is None else now + dispatch.remaining_s,
            suspect=dispatch.suspect,
        )

    def take_offer(self, peer: WorkerId, offer: Offer, now: float) -> None:
        key = SequenceKey(RequestId(offer.request_id), offer.choice)
        prompt = unpack_ids(offer.prompt)
        reason = self._reason_to_refuse(key, offer, prompt)
        if reason is not None:
            self._desk.post.send(peer, refuse(offer, reason))
            return
        self._ledger.admit(key, offer.attempt, now)
        owner = Owner(GatewayId(offer.gateway), Incarnation(offer.gateway_incarnation), offer.epoch)
        log = SequenceLog(owner=owner, attempt=offer.attempt, given=len(offer.tokens), tokens=list(offer.tokens))
        given = tuple(offer.tokens)
        self._ledger.sequences[key] = sequence = WorkerSequence(
            key=key,
            attempt=offer.attempt,
            job=SequenceJob(
                key=key,
                prompt=prompt,
                given=given,
                sampling=offer.sampling,
                salt=offer.salt,
                suspect=offer.suspect,
                promise=_promise(offer, now),
            ),
            log=self._ledger.logs.open(key, log),
            peer=peer,
            receiver=Receiver(offer, peer),
            deadline=None if offer.remaining_s is None else now + offer.remaining_s,
            suspect=offer.suspect,
        )
        self._desk.receiving.take_offer(sequence)

    def _reason_to_refuse(self, key: SequenceKey, offer: Offer, prompt: tuple[int, ...]) -> RefuseReason | None:
        current = self._ledger.sequences.get(key)
        if self._ledger.floors.is_stale(key, offer.attempt) or (current is not None and current.attempt >= offer.attempt):
            return "stale"
        return self._intake.reason_to_refuse(offer, prompt) or ("draining" if self._evacuation.leaving else None)


def _promise(asked: Dispatch | Offer, now: float) -> Promise:
    """An offered sequence has its first token, or will have it at once: only a dispatch has a deadline for it."""
    left_s = asked.ttft_left_s if isinstance(asked, Dispatch) else None
    return Promise(
        deadline=math.inf if left_s is None else now + left_s,
        tpot_s=asked.tpot_s,
        best_effort=asked.best_effort,
        gives_way=asked.gives_way,
        expected_tokens=asked.expected_tokens,
    )


def owner_of(dispatch: Dispatch) -> Owner:
    return Owner(GatewayId(dispatch.gateway), Incarnation(dispatch.incarnation), dispatch.epoch)
