"""What a gateway finds when a client comes back to a request."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from common.mesh.request_progress import RequestProgress
from common.protocol.request_record import RequestRecord
from common.protocol.stored_log import StoredChoice

Owned = TypeVar("Owned", bound=RequestProgress)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ours(Generic[Owned]):
    """It runs here, or has just ended here."""

    owned: Owned


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenOver:
    """It was another gateway's, and is ours from this epoch on; `record` is as it was before."""

    record: RequestRecord
    epoch: int
    log: Mapping[int, StoredChoice]


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedElsewhere:
    """Only its record and its log are left."""

    record: RequestRecord
    log: Mapping[int, StoredChoice]


Attachable = Ours[Owned] | TakenOver | EndedElsewhere
