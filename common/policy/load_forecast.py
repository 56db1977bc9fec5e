"""How many requests will come, and which: the mean since the load last changed, and a trend where there is one.

The window of intervals that counts is as long as nothing has changed, so that chance averages out, and is cut where the load before
differs from the load after by more than chance (adaptive windowing: Bifet and Gavaldà, 2007): of requests, prompt tokens and output
tokens a second, each a compound Poisson process. A trend is believed a few seconds ahead (damped: Gardner and McKenzie, 1985).
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from common.policy.role_view import SeenRequest

TREND_FROM_S = 10.0
"""Of a shorter window nothing is said but its mean."""
TREND_ERRORS = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastPace:
    """The window is `least_s` to `most_s` long and holds at most `most_seen` requests as a sample. `surprise`: standard errors by
    which two parts differ that are not one load. `trend_fades_s`: how far ahead a trend is believed. Of the
    sample, what is `mix_fades_s` older counts a third."""

    least_s: float = 3.0
    most_s: float = 60.0
    most_seen: int = 1024
    surprise: float = 3.0
    trend_fades_s: float = 8.0
    mix_fades_s: float = 20.0


@dataclass(frozen=True, slots=True)
class _Interval:
    """`sums` and `squares`: of one, of the prompt tokens and of the output tokens of the requests that came in it."""

    seconds: float
    sums: tuple[float, float, float]
    squares: tuple[float, float, float]
    seen: tuple[SeenRequest, ...]


class LoadForecast:
    def __init__(self, pace: ForecastPace) -> None:
        self._pace = pace
        self._window: deque[_Interval] = deque()
        self._seconds = 0.0

    def observe(self, seconds: float, arrived: int, seen: Sequence[SeenRequest]) -> None:
        """`arrived` requests in the last `seconds`, `seen` a sample of them."""
        if seconds <= 0.0:
            return
        weight = arrived / len(seen) if seen else 0.0
        prompts = [request.prompt_tokens for request in seen]
        outputs = [request.output_tokens for request in seen]
        sums = (float(arrived), weight * sum(prompts), weight * sum(outputs))
        squares = (float(arrived), weight * sum(p * p for p in prompts), weight * sum(o * o for o in outputs))
        self._window.append(_Interval(seconds, sums, squares, tuple(seen)))
        self._seconds += seconds
        for _ in range(self._intervals_of_another_load()):
            self._forget()
        while self._seconds > self._pace.most_s and len(self._window) > 1:
            self._forget()
        while len(self._window) > 1 and sum(len(interval.seen) for interval in self._window) > self._pace.most_seen:
            self._forget()

    @property
    def known_requests(self) -> float:
        """How many requests the rate is known from: it is as uncertain as a count of so many."""
        return sum(interval.sums[0] for interval in self._window)

    @property
    def known_s(self) -> float:
        """Seconds for which the load has been what it is."""
        return self._seconds

    def rate_at(self, ahead_s: float) -> float:
        """Requests a second, then; never more than double or less than half of what they are."""
        if not self._window:
            return 0.0
        mean = self.known_requests / self._seconds
        slope = self._slope(mean)
        ahead = 0.5 * self._seconds + self._pace.trend_fades_s * -math.expm1(-ahead_s / self._pace.trend_fades_s)
        return min(2.0 * mean, max(0.5 * mean, mean + slope * ahead))

    def mix(self) -> tuple[Sequence[SeenRequest], Sequence[float]]:
        """The requests of the window, and how much each counts: where an interval is a sample, each stands for several, and the mix
        may be on the move though no two parts differ yet."""
        requests: list[SeenRequest] = []
        weights: list[float] = []
        age_s = self._seconds
        for interval in self._window:
            age_s -= interval.seconds
            if interval.seen:
                weight = interval.sums[0] / len(interval.seen) * math.exp(-age_s / self._pace.mix_fades_s)
                requests += interval.seen
                weights += [weight] * len(interval.seen)
        return requests, weights

    def _forget(self) -> None:
        self._seconds -= self._window.popleft().seconds

    def _intervals_of_another_load(self) -> int:
        """How many of the oldest intervals are of a load that is over: up to the split with the most surprising difference."""
        whole = _Side()
        for interval in self._window:
            whole.add(interval)
        old, most, cut = _Side(), self._pace.surprise, 0
        for place, interval in enumerate(self._window, start=1):
            old.add(interval)
            if whole.seconds - old.seconds < self._pace.least_s:
                break
            if old.seconds >= self._pace.least_s and (surprise := old.differs_from_rest_of(whole)) > most:
                most, cut = surprise, place
        return cut

    def _slope(self, mean: float) -> float:
        """Least squares over the window, in requests a second each second; zero unless it is above chance."""
        if len(self._window) < 4 or self._seconds < TREND_FROM_S:
            return 0.0
        at, points = 0.0, []
        for interval in self._window:
            points.append((at + 0.5 * interval.seconds - 0.5 * self._seconds, interval))
            at += interval.seconds
        spread = sum(interval.seconds * place * place for place, interval in points)
        slope = sum(place * interval.sums[0] for place, interval in points) / spread
        error = math.sqrt(max(mean, 1e-9) / spread)
        return slope if abs(slope) > TREND_ERRORS * error else 0.0


class _Side:
    """Sums over a part of the window."""

    __slots__ = ("seconds", "squares", "sums")

    def __init__(self) -> None:
        self.seconds = 0.0
        self.sums = [0.0, 0.0, 0.0]
        self.squares = [0.0, 0.0, 0.0]

    def add(self, interval: _Interval) -> None:
        self.seconds += interval.seconds
        for place in range(3):
            self.sums[place] += interval.sums[place]
            self.squares[place] += interval.squares[place]

    def differs_from_rest_of(self, whole: "_Side") -> float:
        """In standard errors, of the quantity that differs most."""
        rest_s = whole.seconds - self.seconds
        most = 0.0
        for place in range(3):
            gap = self.sums[place] / self.seconds - (whole.sums[place] - self.sums[place]) / rest_s
            squares = self.squares[place]
            variance = squares / self.seconds**2 + (whole.squares[place] - squares) / rest_s**2
            if variance > 0.0:
                most = max(most, abs(gap) / math.sqrt(variance))
        return most
