"""The requests that a plan is for, at any rate and of any seed: drawn from classes, or windows of a trace."""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Protocol

from common.policy.closed_form import ExpectedRequest
from common.simulation.goodput.flight import Arrival
from common.simulation.goodput.rescaling import at_rate
from common.simulation.goodput.workloads import Workload
from common.values.objectives import Objectives


class Demand(Protocol):
    """`objectives` by class, as the simulator takes them."""

    @property
    def objectives(self) -> Mapping[str, Objectives]: ...

    def draw(self, requests: int, rate: float, seed: int) -> list[Arrival]:
        """The same seed gives the same requests at every rate."""
        ...


class DrawnDemand:
    """`kv_tokens`: a request that no worker holds is left out, as its gateway would refuse it."""

    def __init__(self, workload: Workload, kv_tokens: int) -> None:
        self._workload = workload
        self._kv_tokens = kv_tokens

    @property
    def objectives(self) -> Mapping[str, Objectives]:
        return self._workload.objectives

    def draw(self, requests: int, rate: float, seed: int) -> list[Arrival]:
        drawn = self._workload.draw(requests, rate, Random(seed))
        return [each for each in drawn if each.prompt_tokens + each.output_tokens <= self._kv_tokens]


class TraceDemand:
    """A seed is another window of the trace, and a rate another pace of its time."""

    def __init__(self, trace: Sequence[Arrival], objectives: Objectives, kv_tokens: int) -> None:
        self._trace = [each for each in trace if each.prompt_tokens + each.output_tokens <= kv_tokens]
        self._objectives = objectives
        if len(self._trace) < 2:
            raise ValueError("the trace leaves fewer than two requests")

    @property
    def objectives(self) -> Mapping[str, Objectives]:
        return {"": self._objectives}

    def draw(self, requests: int, rate: float, seed: int) -> list[Arrival]:
        count = min(requests, len(self._trace))
        start = seed * count % (len(self._trace) - count + 1)
        return at_rate(self._trace[start : start + count], rate).arrivals


def expected_requests(demand: Demand, count: int, seed: int) -> list[ExpectedRequest]:
    """A sample for the closed form."""
    objectives = demand.objectives
    return [
        ExpectedRequest(
            prompt_tokens=each.prompt_tokens,
            output_tokens=each.output_tokens,
            objectives=objectives.get(each.request_class) or objectives[""],
        )
        for each in demand.draw(count, 1.0, seed)
    ]
