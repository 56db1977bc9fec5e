"""When a worker's role changes: one at a time, not before the last change has settled, and only for a gain that pays.

The rules here are what keeps roles from swinging to and fro; what a change would gain is found by trial
(`simulation/roles/role_trial`) and handed in.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from common.policy.load_forecast import ForecastPace
from common.policy.role_demand import Pressure, RequestMean, pressure
from common.policy.role_view import MeshView, RoleMove, WorkerView

DOUBTS = 2.0
"""Standard errors that a gain has to be above zero."""
HoldReason = Literal["nothing seen", "changing", "cooling down", "calm", "no candidate", "tried lately", "no gain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleControlSettings:
    """`cooldown_s`: at least between two changes. `calm`: below that pressure in both phases nothing is tried. `horizon_s`: of a
    trial, in which a change has to pay for itself; `least_gain`: the share of its requests that have to become good by it,
    and more than the trials differ by chance. `trials` of at most `most_requests` each bound the time of a decision. `back_gain`:
    what a change wants within `settle_s` after one the other way. A phase that has been without a worker for `missing_s` gets one.
    Trials are at least `try_every_s` apart; below `sure_gain` two in a row have to say the same: a change can
    be made later too."""

    cooldown_s: float = 10.0
    calm: float = 0.7
    horizon_s: float = 20.0
    least_gain: float = 0.02
    back_gain: float = 0.04
    sure_gain: float = 0.15
    settle_s: float = 30.0
    missing_s: float = 5.0
    try_every_s: float = 2.0
    trials: int = 5
    most_requests: int = 600
    forecast: ForecastPace = field(default_factory=ForecastPace)

    def __post_init__(self) -> None:
        if self.cooldown_s < 0.0 or self.horizon_s <= 0.0 or self.trials < 2 or self.most_requests < 1:
            raise ValueError("a trial has requests and seconds, and there are at least two")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Shares of good requests, by trial: as it is, and with the move. The same requests in both."""

    move: RoleMove
    stay: tuple[float, ...]
    moved: tuple[float, ...]

    @property
    def gain(self) -> float:
        return sum(self.moved) / len(self.moved) - sum(self.stay) / len(self.stay)

    @property
    def doubt(self) -> float:
        """The standard error of the gain."""
        gains = [moved - stay for moved, stay in zip(self.moved, self.stay, strict=True)]
        variance = sum((gain - self.gain) ** 2 for gain in gains) / (len(gains) - 1)
        return math.sqrt(variance / len(gains))


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleDecision:
    """`move` None: everything stays, because of `reason`. What was looked at comes along: `rate` is the forecast."""

    number: int
    now: float
    move: RoleMove | None
    reason: HoldReason | Literal["gain", "phase without a worker"]
    rate: float = 0.0
    pressure: Pressure | None = None
    trials: tuple[Trial, ...] = ()


class RoleGuard:
    """Remembers the changes that were made."""

    def __init__(self, settings: RoleControlSettings) -> None:
        self._settings = settings
        self._last: tuple[float, RoleMove] | None = None
        self._missing_since: float | None = None
        self._tried_at = -math.inf
        self._paid: tuple[float, RoleMove] | None = None

    def may_try(self, now: float) -> bool:
        """Notes the trial that follows."""
        if now - self._tried_at < self._settings.try_every_s:
            return False
        self._tried_at = now
        return True

    def holds(self, view: MeshView) -> HoldReason | None:
        """Why nothing may change now, whatever it would gain."""
        if any(worker.changing for worker in view.workers):
            return "changing"
        if self._last is not None and view.now - self._last[0] < self._settings.cooldown_s:
            return "cooling down"
        return None

    def for_missing(self, view: MeshView) -> RoleMove | None:
        """A phase without any worker gets one, where free placement does not serve it anyway; not at once: a lost worker may be back
        in a moment."""
        lacks = not (view.prefill or view.both) or not (view.decode or view.both)
        if not lacks or view.free or len(view.workers) < 2:
            self._missing_since = None
            return None
        if self._missing_since is None:
            self._missing_since = view.now
        if view.now - self._missing_since < self._settings.missing_s:
            return None
        to_prefill = not view.prefill
        chosen = min(view.workers, key=_least_to_move if to_prefill else _least_queued)
        return RoleMove(worker=chosen.worker, role="prefill" if to_prefill else "decode")

    def wanted_gain(self, move: RoleMove, now: float) -> float:
        if self._last is not None and self._last[1].role != move.role and now - self._last[0] < self._settings.settle_s:
            return self._settings.back_gain
        return self._settings.least_gain

    def pays(self, trial: Trial, now: float) -> bool:
        """Notes it, for the next trial to confirm."""
        before, self._paid = self._paid, None
        if trial.gain < max(self.wanted_gain(trial.move, now), DOUBTS * trial.doubt):
            return False
        self._paid = (now, trial.move)
        if trial.gain >= self._settings.sure_gain:
            return True
        recent_s = 2.0 * self._settings.try_every_s
        return before is not None and before[1].role == trial.move.role and now - before[0] <= recent_s

    def changed(self, move: RoleMove, now: float) -> None:
        self._last = (now, move)


def candidate(view: MeshView, mean: RequestMean, rate: float, settings: RoleControlSettings) -> tuple[Pressure, RoleMove | None]:
    """The move that relieves the more pressed phase; None where that is not to be had: nothing is pressed, or the other phase would
    lose its last worker, or would be pressed as much in turn."""
    now = pressure(view, mean, rate, within_s=settings.horizon_s)
    if now.worst < settings.calm or not view.prefill or not view.decode:
        return now, None
    to_prefill = now.prefill > now.decode
    givers = view.decode if to_prefill else view.prefill
    if len(givers) < 2:
        return now, None
    after = pressure(view, mean, rate, within_s=settings.horizon_s, moved=1 if to_prefill else -1)
    if after.worst >= now.worst and after.worst > 1.0:
        return now, None
    chosen = min(givers, key=_least_to_move if to_prefill else _least_queued)
    return now, RoleMove(worker=chosen.worker, role="prefill" if to_prefill else "decode")


def decide(
    number: int,
    view: MeshView,
    guard: RoleGuard,
    settings: RoleControlSettings,
    *,
    mean: RequestMean | None,
    rate: float,
    attempt: Callable[[RoleMove], Trial],
) -> RoleDecision:
    """`attempt` tries a move in the simulator; it is asked only for a move that may be made."""
    missing, held = guard.for_missing(view), guard.holds(view)
    if missing is not None and held is None:
        guard.changed(missing, view.now)
        return RoleDecision(number=number, now=view.now, move=missing, reason="phase without a worker")
    if mean is None:
        return RoleDecision(number=number, now=view.now, move=None, reason="nothing seen")
    pressed, move = candidate(view, mean, rate, settings)
    if held is not None:
        return RoleDecision(number=number, now=view.now, move=None, reason=held, rate=rate, pressure=pressed)
    if move is None:
        reason: HoldReason = "calm" if pressed.worst < settings.calm else "no candidate"
        return RoleDecision(number=number, now=view.now, move=None, reason=reason, rate=rate, pressure=pressed)
    if not guard.may_try(view.now):
        return RoleDecision(number=number, now=view.now, move=None, reason="tried lately", rate=rate, pressure=pressed)
    trial = attempt(move)
    if not guard.pays(trial, view.now):
        return RoleDecision(number=number, now=view.now, move=None, reason="no gain", rate=rate, pressure=pressed, trials=(trial,))
    guard.changed(move, view.now)
    return RoleDecision(number=number, now=view.now, move=move, reason="gain", rate=rate, pressure=pressed, trials=(trial,))


def _least_to_move(worker: WorkerView) -> tuple[int, int, str]:
    return worker.decoding_kv_tokens, worker.decoding, worker.worker


def _least_queued(worker: WorkerView) -> tuple[float, str]:
    return worker.prefill_queue_s, worker.worker
