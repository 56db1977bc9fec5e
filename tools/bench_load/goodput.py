"""Which requests were good, and what that makes of a point: attainment, goodput, fluidity.

A request is good if it ended well and met both objectives. Whatever failed, was refused or never ended is a miss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tools.bench_load.quantiles import Interval, wilson
from tools.bench_load.request_class import Objective
from tools.bench_load.request_result import RequestResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Attainment:
    """Of `requests`: how many met their TTFT, their TPOT, and both."""

    requests: int
    ttft_good: int
    tpot_good: int
    good: int

    @property
    def share(self) -> float:
        return self.good / self.requests if self.requests else 0.0

    @property
    def interval(self) -> Interval:
        return wilson(self.good, self.requests)


def meets_ttft(result: RequestResult, objective: Objective) -> bool:
    return result.is_complete and result.ttft_s is not None and result.ttft_s <= objective.ttft_s


def meets_tpot(result: RequestResult, objective: Objective) -> bool:
    return result.is_complete and result.tpot_s is not None and result.tpot_s <= objective.tpot_s


def is_good(result: RequestResult, objective: Objective) -> bool:
    return meets_ttft(result, objective) and meets_tpot(result, objective)


def attainment(results: Sequence[RequestResult], objectives: Mapping[str, Objective]) -> Attainment:
    """Of the measured requests whose class has an objective."""
    judged = [(one, objectives[one.kind]) for one in results if one.measured and one.kind in objectives]
    return Attainment(
        requests=len(judged),
        ttft_good=sum(meets_ttft(*pair) for pair in judged),
        tpot_good=sum(meets_tpot(*pair) for pair in judged),
        good=sum(is_good(*pair) for pair in judged),
    )


def attainment_by_class(results: Sequence[RequestResult], objectives: Mapping[str, Objective]) -> dict[str, Attainment]:
    kinds = sorted({one.kind for one in results if one.measured and one.kind in objectives})
    return {kind: attainment([one for one in results if one.kind == kind], objectives) for kind in kinds}


def duration_s(results: Sequence[RequestResult]) -> float:
    """From the first measured request's schedule to the last one's end."""
    measured = [one for one in results if one.measured]
    if not measured:
        return 0.0
    return max(one.ended_s for one in measured) - min(one.scheduled_s for one in measured)


def goodput_per_s(results: Sequence[RequestResult], objectives: Mapping[str, Objective]) -> float:
    took = duration_s(results)
    return attainment(results, objectives).good / took if took > 0.0 else 0.0


def fluidity(result: RequestResult, objective: Objective) -> float:
    """The part of its arrivals that came by their deadline (Etalon's fluidity index): the first is due after `ttft_s`, each
    later one `tpot_s` after the one before was due; early ones leave slack to the later, a late one starts the count anew."""
    if not result.is_complete:
        return 0.0
    due, met = result.scheduled_s + objective.ttft_s, 0
    for arrival in result.arrivals_s:
        in_time = arrival <= due
        met += in_time
        due = (due if in_time else arrival) + objective.tpot_s
    return met / len(result.arrivals_s)
