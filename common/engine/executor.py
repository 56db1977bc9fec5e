"""What computes one step, synchronously: torch or the synthetic engine stand behind this, a StepThread in front of it."""

from typing import Protocol

from common.values.step import StepPlan, StepResult


class Executor(Protocol):
    """Used by one thread only. It keeps the sequences that plans have started, so sampled tokens never leave and return."""

    def prepare_thread(self, threads: int) -> None:
        """Called once, in the thread that will execute, before the first plan: `threads` compute threads may be used."""
        ...

    def execute(self, plan: StepPlan) -> StepResult:
        """Faults of single rows are in the result; what is raised means that the engine itself is broken."""
        ...
