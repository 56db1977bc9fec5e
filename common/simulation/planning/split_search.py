"""The search for the best candidate: closed form, then its neighbours by simulation, then bisection of the rate.

A candidate is first tried at the best rate found so far and a little more. Only where it stands that, its own goodput is
searched: most cost one simulation. The goodput of splits has one peak, so a side is left after two that do not stand it.
"""

from collections.abc import Callable, Iterable

from common.policy.closed_form import ClosedForm
from common.simulation.goodput.goodput_knee import PRECISION, Knee, find_knee
from common.simulation.planning.candidate import Candidate, Kind
from common.simulation.planning.trial import Trial

MISSES = 2
"""Neighbours in a row that are worse, after which a side is left."""
LEAST_SHARE = 0.3
"""Of the best goodput: what is below is not looked at more closely."""

Attempt = Callable[[Candidate, float], Trial]


class SplitSearch:
    """`attempt` simulates. `every_class`: each class has to attain what is wanted, not all requests together. What was tried is kept
    in `trials`, goodputs in `knees`."""

    def __init__(self, workers: int, form: ClosedForm, attempt: Attempt, *, wanted: float, every_class: bool = False) -> None:
        if workers < 1:
            raise ValueError("there is at least one worker")
        self._workers = workers
        self._form = form
        self._attempt = attempt
        self._wanted = wanted
        self._every_class = every_class
        self.trials: dict[Candidate, dict[float, Trial]] = {}
        self.knees: dict[Candidate, Knee] = {}

    def best(self) -> Candidate:
        """Strict splits first: free placement and colocation have to be better to be chosen."""
        together = Candidate(kind="colocated", prefill=self._workers)
        if self._workers == 1:
            self.goodput(together)
            return together
        guess = max(range(1, self._workers), key=lambda prefill: self._form.split(prefill, self._workers - prefill).rate)
        best = self._climb("split", guess, self._split("split", guess))
        best = self._better(best, together)
        return self._climb("free", best.prefill if best.decode else guess, best)

    def goodput(self, candidate: Candidate, *, start: float | None = None, least: float = 0.0) -> Knee:
        """Searched once; zero where it is below `least`."""
        if candidate not in self.knees:
            guess = start or self._guess(candidate)
            self.knees[candidate] = find_knee(
                lambda rate: self._attained(candidate, rate), wanted=self._wanted, start=max(guess, least), least=least
            )
        return self.knees[candidate]

    def others(self, best: Candidate) -> list[Candidate]:
        """The strongest of each other kind, and the strongest of the rest, by goodput."""
        least = LEAST_SHARE * self.knees[best].rate
        tried = [candidate for candidate in self.trials if candidate != best]
        chosen = [self._strongest(c for c in tried if c.kind == kind) for kind in ("split", "free", "colocated")]
        found = [candidate for candidate in chosen if candidate is not None]
        for candidate in found:
            self.goodput(candidate, start=self._last_guess(candidate), least=least)
        return sorted(found, key=lambda candidate: self.knees[candidate].rate, reverse=True)

    def trial_above(self, candidate: Candidate) -> Trial | None:
        """The lowest rate beyond its goodput that was tried: what is missed there is what binds."""
        knee = self.knees[candidate]
        above = [rate for rate in self.trials[candidate] if rate > knee.rate]
        return self.trials[candidate][min(above)] if above else None

    def _climb(self, kind: Kind, start: int, best: Candidate) -> Candidate:
        if best == self._split(kind, start):
            self.goodput(best)
        else:
            best = self._better(best, self._split(kind, start))
        for direction in (-1, 1):
            misses, prefill = 0, start + direction
            while misses < MISSES and 1 <= prefill < self._workers:
                better = self._better(best, self._split(kind, prefill))
                misses = misses + 1 if better == best else 0
                best, prefill = better, prefill + direction
        return best

    def _better(self, best: Candidate, other: Candidate) -> Candidate:
        rate = self.knees[best].rate * (1.0 + PRECISION)
        if rate > 0.0 and self._attained(other, rate) < self._wanted:
            return best
        knee = self.goodput(other, start=rate or None)
        return other if knee.rate > self.knees[best].rate else best

    def _strongest(self, among: Iterable[Candidate]) -> Candidate | None:
        """By goodput where that is known, else by what was attained at the highest rate that was tried."""
        return max(among, key=self._strength, default=None)

    def _strength(self, candidate: Candidate) -> float:
        if candidate in self.knees:
            return self.knees[candidate].rate
        return self._last_guess(candidate)

    def _last_guess(self, candidate: Candidate) -> float:
        """Who attains a part of what is wanted bears about that part of the rate."""
        rate, trial = max(self.trials[candidate].items())
        return rate * min(1.0, self._share(trial) / self._wanted)

    def _guess(self, candidate: Candidate) -> float:
        if candidate.kind == "colocated":
            return max(self._form.colocated(candidate.prefill).rate, 1e-3)
        return max(self._form.split(candidate.prefill, candidate.decode).rate, 1e-3)

    def _split(self, kind: Kind, prefill: int) -> Candidate:
        return Candidate(kind=kind, prefill=prefill, decode=self._workers - prefill)

    def _attained(self, candidate: Candidate, rate: float) -> float:
        tried = self.trials.setdefault(candidate, {})
        if rate not in tried:
            tried[rate] = self._attempt(candidate, rate)
        return self._share(tried[rate])

    def _share(self, trial: Trial) -> float:
        return trial.least_class if self._every_class else trial.attained
