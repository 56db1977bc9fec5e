"""Runs an executor's steps on the event loop itself: for an engine whose steps take no time, where a thread would cost more than
the step."""

import asyncio

from common.engine.executor import Executor
from common.engine.step_thread import MAX_OUTSTANDING
from common.ports.step_engine import Ticket
from common.values.errors import InvariantBroken
from common.values.step import StepPlan, StepResult


class InlineSteps:
    """A StepEngine. A step is computed when it is submitted; its result comes a turn of the loop later, so that messages and
    streams get theirs between steps."""

    def __init__(self, executor: Executor) -> None:
        executor.prepare_thread(1)
        self._executor = executor
        self._results: dict[Ticket, StepResult] = {}
        self._tickets = 0
        self._closed = False

    def submit(self, plan: StepPlan) -> Ticket:
        if self._closed:
            raise InvariantBroken("the step engine is closed")
        if len(self._results) >= MAX_OUTSTANDING:
            raise InvariantBroken(f"{MAX_OUTSTANDING} steps are outstanding already: await a result first")
        self._tickets += 1
        ticket = Ticket(self._tickets)
        self._results[ticket] = self._executor.execute(plan)
        return ticket

    async def result(self, ticket: Ticket) -> StepResult:
        """Safe to cancel: the ticket stays valid until its result was returned."""
        if ticket not in self._results:
            raise InvariantBroken(f"no step is outstanding under ticket {ticket}")
        await asyncio.sleep(0)
        return self._results.pop(ticket)

    async def close(self) -> None:
        self._closed = True
