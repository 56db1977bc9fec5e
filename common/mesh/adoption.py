"""A request of another gateway, rebuilt from its record and its token log, ready to be gone on with.

Nothing of the old gateway is asked: what the log lacks is asked of the workers, and what they have lost is computed again
under a higher attempt. Both give the tokens that the old gateway had.
"""

import math
from collections.abc import Mapping

import msgspec

from common.mesh.gateway_request import GatewayRequest
from common.protocol.request_record import RequestFacts, RequestRecord
from common.protocol.stored_log import StoredChoice
from common.protocol.token_stream import TokenStream
from common.values.ids import RequestId
from common.values.tokens import DEADLINE_CODE, NewTokens


def adopted_request(
    request_id: RequestId, record: RequestRecord, log: Mapping[int, StoredChoice], *, epoch: int, deadline: float | None
) -> GatewayRequest:
    """Its streams are empty: `GatewayCore.adopt` is given what the log holds beside it."""
    facts = record.facts
    attempt = max([record.attempt, *(choice.attempt for choice in log.values())])
    choices = range(facts.choices)
    return GatewayRequest(
        request_id=request_id,
        model=facts.model,
        prompt=record.prompt,
        sampling=facts.sampling,
        salt=facts.salt,
        streams={choice: TokenStream(choice=choice, attempt=attempt) for choice in choices},
        deadline=deadline,
        epoch=epoch,
        attempt=attempt,
        worker=record.worker,
        answered=record.worker is not None,
        accepted=True,
        wanted=facts.wanted,
        is_adopted=True,
        source={} if record.worker is None else dict.fromkeys(choices, record.worker),
        heard_at=dict.fromkeys(choices, -math.inf),
        involved={worker for worker in (record.worker, record.decode_worker) if worker is not None},
    )


def logged_tokens(facts: RequestFacts, log: Mapping[int, StoredChoice]) -> dict[int, NewTokens]:
    """By choice: the part of the log that is complete, with all that was asked for; the rest is made again. That a worker kept the
    deadline is not the choice's end, but the request's."""
    known: dict[int, NewTokens] = {}
    for choice, stored in log.items():
        if not 0 <= choice < facts.choices:
            continue
        if facts.sampling.prompt_logprobs is not None and choice == 0 and stored.prompt_logprobs is None:
            continue
        new = stored.new_tokens(with_logprobs=facts.sampling.logprobs is not None)
        if new.ending is not None and new.ending.error_code == DEADLINE_CODE:
            new = msgspec.structs.replace(new, ending=None)
        if new.tokens or new.ending is not None:
            known[choice] = new
    return known
