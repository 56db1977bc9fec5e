"""From a request's record back to a request of this gateway: one that is taken over, or one that has ended and is only read."""

from collections.abc import Callable, Mapping

from common.mesh.adoption import logged_tokens
from common.mesh.request_progress import CancelInMesh, recorded_generation
from common.protocol.request_record import RequestRecord
from common.protocol.stored_log import StoredChoice
from common.values.errors import RequestFailed
from common.values.ids import RequestId
from services.gateway.live_generation import OwnedRequest


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
    owned.taken_over(record, epoch=epoch, attempt=attempt)
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
    request = recorded_generation(request_id, record)
    owned = OwnedRequest(request, record.facts.model, cancel_in_mesh=cancel_in_mesh, clock=clock)
    owned.was_accepted()
    return owned


def _nothing_to_cancel(request_id: RequestId, choice: int | None) -> None:
    return None
