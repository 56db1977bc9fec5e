"""From a request's record back to a request of this gateway: one that is taken over, or one that has ended and is only read."""

from collections.abc import Callable, Mapping

from common.mesh.adoption import logged_tokens
from common.ports.generation import GenerationRequest
from common.protocol.request_record import RequestRecord
from common.protocol.stored_log import StoredChoice
from common.values.errors import RequestFailed
from common.values.ids import RequestId
from services.gateway.live_generation import CancelInMesh, OwnedRequest


def taken_over(
    request_id: RequestId,
    record: RequestRecord,
    *,
    epoch: int,
    attempt: int,
    cancel_in_mesh: CancelInMesh,
    clock: Callable[[], float],
) -> OwnedRequest:
    owned = _owned(request_id, record, cancel_in_mesh, clock)
    owned.epoch, owned.attempt = epoch, attempt
    owned.worker, owned.decode_worker = record.worker, record.decode_worker
    owned.is_recorded = True
    return owned


def ended_request(
    request_id: RequestId, record: RequestRecord, log: Mapping[int, StoredChoice], *, clock: Callable[[], float]
) -> OwnedRequest:
    """Nothing runs any more: the tokens of its log, and then its error, where it ended with one."""
    owned = _owned(request_id, record, _nothing_to_cancel, clock)
    for choice, new in logged_tokens(record.facts, log).items():
        owned.deliver(choice, new)
    failed = record.error
    owned.finish(None if failed is None else RequestFailed(failed.message, code=failed.code, status=failed.status))
    return owned


def _owned(request_id: RequestId, record: RequestRecord, cancel_in_mesh: CancelInMesh, clock: Callable[[], float]) -> OwnedRequest:
    """Somebody knows how to come back to it, so it lingers."""
    facts = record.facts
    request = GenerationRequest(
        request_id=request_id,
        model=facts.model.name,
        prompt=record.prompt,
        sampling=facts.sampling,
        choices=facts.choices,
        body=facts.body,
        salt=facts.salt,
        deadline_s=facts.deadline_s,
        tenant=facts.tenant,
        lingers=True,
        keep_prompt=facts.keep_prompt,
        idempotency=facts.idempotency,
    )
    owned = OwnedRequest(request, facts.model, cancel_in_mesh=cancel_in_mesh, clock=clock)
    owned.was_accepted()
    return owned


def _nothing_to_cancel(request_id: RequestId, choice: int | None) -> None:
    return None
