"""Runs an executor's steps in a thread of their own, so that the event loop never computes.

Two plans may be outstanding: while one computes the next waits in the queue, and the thread goes from step to step without a
round trip through the loop. The thread runs at a lower priority than the loop, which must stay quick to send tokens.
"""

import asyncio
import contextlib
import logging
import os
import queue
import threading
from dataclasses import dataclass

from common.engine.executor import Executor
from common.ports.step_engine import Ticket
from common.values.errors import InvariantBroken
from common.values.step import StepPlan, StepResult

MAX_OUTSTANDING = 2
COMPUTE_NICENESS = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Job:
    plan: StepPlan
    future: asyncio.Future[StepResult]
    loop: asyncio.AbstractEventLoop


class StepThread:
    """A StepEngine over `executor`. `submit`, `result` and `close` belong to one event loop."""

    def __init__(self, executor: Executor, *, threads: int = 1) -> None:
        self._executor = executor
        self._threads = threads
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._waiting: dict[Ticket, asyncio.Future[StepResult]] = {}
        self._tickets = 0
        self._broken: BaseException | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="segue-step", daemon=True)
        self._thread.start()

    def submit(self, plan: StepPlan) -> Ticket:
        """Must be called on the event loop that awaits the result. An outstanding ticket is one whose result was not taken."""
        if self._closing:
            raise InvariantBroken("the step engine is closed")
        if self._broken is not None:
            raise _crashed(self._broken)
        if len(self._waiting) >= MAX_OUTSTANDING:
            raise InvariantBroken(f"{MAX_OUTSTANDING} steps are outstanding already: await a result first")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[StepResult] = loop.create_future()
        self._tickets += 1
        ticket = Ticket(self._tickets)
        self._waiting[ticket] = future
        self._jobs.put(_Job(plan, future, loop))
        return ticket

    async def result(self, ticket: Ticket) -> StepResult:
        """Safe to cancel: the ticket stays valid until its result was returned."""
        future = self._waiting.get(ticket)
        if future is None:
            raise InvariantBroken(f"no step is outstanding under ticket {ticket}")
        await asyncio.wait([future])
        self._waiting.pop(ticket, None)
        return future.result()

    async def close(self) -> None:
        """Waits for the step that is computing; a step that has not begun ends with InvariantBroken. Idempotent."""
        if not self._closing:
            self._closing = True
            self._jobs.put(None)
        while self._thread.is_alive():
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    def _run(self) -> None:
        _lower_priority()
        try:
            self._executor.prepare_thread(self._threads)
        except BaseException as error:  # kept, and raised by every result
            self._break(error)
        while (job := self._jobs.get()) is not None:
            if self._closing:
                _deliver(job, None, InvariantBroken("the step engine was closed before this step began"))
            elif self._broken is not None:
                _deliver(job, None, _crashed(self._broken))
            else:
                self._execute(job)

    def _execute(self, job: _Job) -> None:
        try:
            result = self._executor.execute(job.plan)
        except BaseException as error:  # kept, and raised by every result
            self._break(error)
            _deliver(job, None, _crashed(error))
        else:
            _deliver(job, result, None)

    def _break(self, error: BaseException) -> None:
        logger.error("step engine broken", exc_info=error)
        self._broken = error


def _deliver(job: _Job, result: StepResult | None, error: Exception | None) -> None:
    with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
        job.loop.call_soon_threadsafe(_settle, job.future, result, error)


def _settle(future: asyncio.Future[StepResult], result: StepResult | None, error: Exception | None) -> None:
    if future.done():
        return
    if result is not None:
        future.set_result(result)
    elif error is not None:
        future.set_exception(error)
        future.exception()  # marks it as retrieved: after a close nobody may come to read it


def _crashed(error: BaseException) -> InvariantBroken:
    broken = InvariantBroken(f"the step engine is broken: {type(error).__name__}: {error}")
    broken.__cause__ = error
    return broken


def _lower_priority() -> None:
    """On Linux niceness belongs to a thread; elsewhere it would lower the whole process, so it is left alone."""
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            current = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, current + COMPUTE_NICENESS))
