"""The inner port: something that computes steps (torch, or the synthetic engine)."""

from typing import NewType, Protocol

from common.values.step import StepPlan, StepResult

Ticket = NewType("Ticket", int)


class StepEngine(Protocol):
    """Steps run one after another in the order of submission: in a thread of their own, so that the caller's loop never
    computes, or on the loop where they take no time.

    A fault of one row is reported in that row's result. `result` raises only when the engine itself is broken.
    """

    def submit(self, plan: StepPlan) -> Ticket:
        """Queue a step. At most two may be outstanding."""
        ...

    async def result(self, ticket: Ticket) -> StepResult: ...

    async def close(self) -> None: ...
