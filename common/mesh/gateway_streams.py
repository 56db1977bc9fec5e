"""The tokens of a gateway's requests: taken in order and once, of the present attempt only, and followed where they move."""

import msgspec

from common.mesh.gateway_attempts import GatewayAttempts
from common.mesh.gateway_effects import Deliver
from common.mesh.gateway_ledger import GatewayLedger
from common.mesh.gateway_request import GatewayRequest
from common.protocol.token_stream import TokenStream
from common.values.errors import RequestFailed
from common.values.ids import WorkerId
from common.values.tokens import DEADLINE_CODE, NewTokens


class GatewayStreams:
    def __init__(self, ledger: GatewayLedger, attempts: GatewayAttempts) -> None:
        self._ledger = ledger
        self._attempts = attempts

    def take(self, request: GatewayRequest, choice: int, worker: WorkerId, new: NewTokens, now: float) -> None:
        stream = request.streams[choice]
        if _lacks_scores(request, stream, new):
            self._ledger.counters["scores_lost"] += 1
            self._attempts.raise_attempt(request, now, lost=None, full=None)
            return
        had_gap = stream.has_gap
        delivered = stream.accept(request.attempt, new)
        if not delivered:
            if stream.has_gap and not had_gap:
                request.heard_at[choice] = now  # what is missing may be just behind
            return
        request.source[choice] = worker
        request.heard_at[choice] = now
        request.raises = 0
        request.last_token_at = now
        if request.first_token_at is None:
            request.first_token_at = now
            self._ledger.promised.settle(request.request_id)
        request.suspicion.token_came(worker, choice)
        request.avoid.clear()
        overdue = delivered[-1].ending is not None and delivered[-1].ending.error_code == DEADLINE_CODE
        if overdue:
            last = delivered.pop()
            delivered += [msgspec.structs.replace(last, ending=None)] if last.tokens else []
        for fresh in delivered:
            self._ledger.emit(Deliver(request_id=request.request_id, choice=choice, new=fresh))
        if overdue:
            self._attempts.fail(request, deadline_passed(), now)
        elif stream.ended and not request.unfinished():
            self._attempts.end(request, None, now)

    def follow(self, request: GatewayRequest, choice: int, worker: WorkerId, target: WorkerId) -> None:
        """A choice has moved from one worker to another. Which life of the target was meant is known since it was placed there;
        a later one may be back before we hear of the move."""
        snapshot = self._ledger.registry.get(target)
        request.involve(target, None if snapshot is None else request.incarnations.get(target, snapshot.incarnation))
        if request.source[choice] == worker:
            request.source[choice] = target


def deadline_passed() -> RequestFailed:
    return RequestFailed("the request's deadline has passed", code=DEADLINE_CODE, status=504)


def _lacks_scores(request: GatewayRequest, stream: TokenStream, new: NewTokens) -> bool:
    """A worker that was given tokens does not know their log-probabilities. Where who adopts the request finds them nowhere
    else, they are computed again."""
    if not new.tokens or new.first + len(new.tokens) <= stream.next_index or new.first > stream.next_index:
        return False
    is_start = stream.choice == 0 and stream.next_index == 0
    lacks_prompt = is_start and request.sampling.prompt_logprobs is not None and new.prompt_logprobs is None
    return lacks_prompt or (request.sampling.logprobs is not None and len(new.logprobs) < len(new.tokens))
