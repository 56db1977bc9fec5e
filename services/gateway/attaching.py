"""Coming back to a request: one that is owned here, one that has ended, or one that is taken over from another gateway."""

import asyncio
import logging

from common.mesh.adoption import adopted_request, logged_tokens
from common.mesh.attachment import EndedElsewhere, Ours, TakenOver
from common.ports.generation import Attached
from common.values.ids import RequestId
from services.gateway.live_generation import OwnedRequest
from services.gateway.mesh_shell import MeshShell
from services.gateway.recorded_request import ended_request, taken_over

logger = logging.getLogger(__name__)


class Attaching:
    """One attach at a time for each request: two that adopted it here at once would cut each other off."""

    def __init__(self, shell: MeshShell) -> None:
        self._shell = shell
        self._busy: dict[RequestId, asyncio.Event] = {}

    async def attach(self, request_id: RequestId, tenant: str) -> Attached:
        while (busy := self._busy.get(request_id)) is not None:
            await busy.wait()
        self._busy[request_id] = done = asyncio.Event()
        try:
            return await self._attach(request_id, tenant)
        finally:
            del self._busy[request_id]
            done.set()

    async def _attach(self, request_id: RequestId, tenant: str) -> Attached:
        found = await self._shell.kept.attach(request_id, tenant, may_take=lambda: self._shell.may_take)
        match found:
            case Ours(owned=owned):
                return await self._join(owned)
            case EndedElsewhere():
                owned = ended_request(request_id, found.record, found.log, clock=self._shell.now)
                return Attached(request=owned.request, generation=owned.read())
            case TakenOver():
                return self._adopt(request_id, found)

    async def _join(self, owned: OwnedRequest) -> Attached:
        """A request of ours. From now on somebody knows how to come back to it."""
        owned.lingers = True
        generation = owned.read()
        try:
            await asyncio.shield(owned.accepted)
        except BaseException:
            await generation.close()
            raise
        return Attached(request=owned.request, generation=generation)

    def _adopt(self, request_id: RequestId, taken: TakenOver) -> Attached:
        record, epoch, now = taken.record, taken.epoch, self._shell.now()
        deadline_s = record.facts.deadline_s
        deadline = None if deadline_s is None else now + deadline_s  # anew: clocks are not compared between hosts
        request = adopted_request(request_id, record, taken.log, epoch=epoch, deadline=deadline)
        shell, attempt = self._shell, request.attempt
        owned = taken_over(request_id, record, epoch=epoch, attempt=attempt, cancel_in_mesh=shell.cancel, clock=shell.now)
        generation = owned.read()
        logger.info("request_adopted", extra={"fields": {"request": request_id, "epoch": epoch, "from": record.owner}})
        shell.core.adopt(request, logged_tokens(record.facts, taken.log), now)
        shell.add(owned)
        return Attached(request=owned.request, generation=generation)
