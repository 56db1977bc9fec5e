"""From a client's wish to a running text generation: a new one, one that its Idempotency-Key names, or one that is resumed.

A resumed request is regenerated from its first token by the same function of request and token log as ever; whoever writes
the events skips those that the client has.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from common.ports.generation import Attached, MeshClient
from common.protocol.request_record import IdempotencyMark
from common.values.errors import StreamNotFound, Unavailable
from common.values.ids import RequestId
from services.gateway.gateway_metrics import GatewayMetrics
from services.gateway.openai.plan import RequestPlan
from services.gateway.openai.plan_record import part_id, read_plan, restored_plan
from services.gateway.openai.planner import Planner
from services.gateway.text_generation import TextGeneration, resumed_generation, text_generation

ADMISSION_S = 5.0
"""How long a repeated request waits for the first one's admission, which another gateway may be at."""
ASK_AGAIN_S = 0.05

Opened = tuple[RequestPlan, TextGeneration]


class ClientRequests:
    def __init__(self, mesh: MeshClient, planner: Planner, metrics: GatewayMetrics) -> None:
        self._mesh = mesh
        self._planner = planner
        self._metrics = metrics

    @asynccontextmanager
    async def opened(self, plan: RequestPlan, *, arrived: float) -> AsyncIterator[Opened]:
        """A plan's generation. Where its idempotency key has a request already, that one's plan and generation."""
        mark = plan.asker.idempotency
        if mark is None:
            async with text_generation(self._mesh, plan, self._metrics, arrived=arrived) as generation:
                yield plan, generation
            return
        async with AsyncExitStack() as stack:
            known = await self._known(plan, mark, stack)
            if known is None:
                yield plan, await stack.enter_async_context(self._first(plan, mark, arrived))
            else:
                yield await stack.enter_async_context(self._resumed(known, "repeated"))

    @asynccontextmanager
    async def resumed(self, stream_id: str, tenant: str) -> AsyncIterator[Opened]:
        """Raises StreamNotFound, Unavailable."""
        async with AsyncExitStack() as stack:
            parts = await self._attached(stream_id, tenant, stack)
            yield await stack.enter_async_context(self._resumed(parts, "resumed"))

    async def _known(self, plan: RequestPlan, mark: IdempotencyMark, stack: AsyncExitStack) -> list[Attached] | None:
        """The requests that the key stands for; None where it is new. Another gateway may still be admitting them: there is
        nothing to be notified by, so this asks again for a while."""
        until = time.monotonic() + ADMISSION_S
        while True:
            holder = await self._mesh.claim(mark, part_id(plan.id, 0))
            if holder == plan.id:
                return None
            try:
                return await self._attached(holder, plan.asker.tenant, stack)
            except StreamNotFound:
                if time.monotonic() > until:
                    raise Unavailable("the first request with this Idempotency-Key is still being admitted") from None
            await asyncio.sleep(ASK_AGAIN_S)

    @asynccontextmanager
    async def _first(self, plan: RequestPlan, mark: IdempotencyMark, arrived: float) -> AsyncIterator[TextGeneration]:
        is_admitted = False
        try:
            async with text_generation(self._mesh, plan, self._metrics, arrived=arrived) as generation:
                is_admitted = True
                yield generation
        finally:
            if not is_admitted:
                await self._mesh.release(mark, part_id(plan.id, 0))

    async def _attached(self, stream_id: str, tenant: str, stack: AsyncExitStack) -> list[Attached]:
        """One for each prompt of the plan; the stack closes them."""
        parts = [await self._attach(part_id(stream_id, 0), tenant, stack)]
        count = read_plan(parts[0].request).prompts
        return parts + [await self._attach(part_id(stream_id, place), tenant, stack) for place in range(1, count)]

    async def _attach(self, request_id: RequestId, tenant: str, stack: AsyncExitStack) -> Attached:
        attached = await self._mesh.attach(request_id, tenant)
        stack.push_async_callback(attached.generation.close)
        return attached

    @asynccontextmanager
    async def _resumed(self, parts: list[Attached], how: str) -> AsyncIterator[Opened]:
        text_model = await self._planner.text_model(parts[0].request.model)
        plan = restored_plan([part.request for part in parts], text_model)
        self._metrics.attached.series(how).add()
        async with resumed_generation(plan, [part.generation for part in parts]) as generation:
            yield plan, generation
