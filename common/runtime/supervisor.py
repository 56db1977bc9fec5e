"""Keeping a set of processes alive, as a pure machine: `handle(event, now) -> effects`, `get_timer()`.

A process that ends is started again, after a pause that doubles with each quick end. One that is silent for too long is
killed and started again. Stopping goes down the stages: the gateway first, then the workers, then the brokers; each has its
time to drain, then it is killed. A second wish to stop kills all at once. Silence counts only while this machine itself was
running: after a pause of the supervisor (a suspended laptop, SIGSTOP) everyone gets their time again.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from common.runtime.supervisor_states import (
    RUNNING,
    TRANSITIONS,
    AllReady,
    Begin,
    ChildInput,
    ChildSpec,
    ChildState,
    Exited,
    Finished,
    Notified,
    Report,
    Signal,
    Spawn,
    StopAsked,
    Stopping,
    SupervisorEffect,
    SupervisorEvent,
    TimerFired,
)
from common.values.errors import InvariantBroken

TICK_S = 1.0
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 10.0
STABLE_AFTER_S = 30.0
"""A process that was ready for this long has earned a quick restart."""
STARTS_BEFORE_GIVING_UP = 4
"""As long as the whole was never ready: a process that cannot even start is told, not retried for ever."""
EXIT_REFUSED_SETTINGS = 2


@dataclass(slots=True)
class _Child:
    spec: ChildSpec
    state: ChildState = "waiting"
    start: int = 0
    heard_at: float = 0.0
    ready_since: float | None = None
    deadline: float | None = None
    pause_s: float = FIRST_PAUSE_S
    quick_ends: int = 0
    killed: bool = False


class Supervisor:
    """Give it specs with distinct names; perform its effects in order."""

    def __init__(self, specs: Iterable[ChildSpec]) -> None:
        self._children = {spec.name: _Child(spec) for spec in specs}
        self._now = 0.0
        self._begun = False
        self._stopping = False
        self._killing_all = False
        self._was_ready = False
        self._finished = False
        self._code = 0
        self._effects: list[SupervisorEffect] = []

    @property
    def states(self) -> dict[str, ChildState]:
        return {name: child.state for name, child in self._children.items()}

    @property
    def finished(self) -> bool:
        return self._finished

    def handle(self, event: SupervisorEvent, now: float) -> list[SupervisorEffect]:
        self._forgive_own_pause(now)
        match event:
            case Begin():
                self._begun = True
            case Notified():
                self._on_notified(event, now)
            case Exited():
                self._on_exited(event, now)
            case StopAsked():
                self._on_stop_asked(now)
            case TimerFired():
                pass
        self._settle(now)
        effects, self._effects = self._effects, []
        return effects

    def get_timer(self) -> float | None:
        """When to call `handle(TimerFired())` at the latest; None before the start and after the end."""
        if not self._begun or self._finished:
            return None
        deadlines = [child.deadline for child in self._children.values() if child.deadline is not None]
        return min([self._now + TICK_S, *(max(deadline, self._now) for deadline in deadlines)])

    def check_invariants(self) -> None:
        for child in self._children.values():
            if self._stopping and child.state in ("waiting", "backoff"):
                raise InvariantBroken(f"{child.spec.name} waits to be started while all stops")
            if child.state in ("backoff", "stopping", "killing") and child.deadline is None:
                raise InvariantBroken(f"{child.spec.name} is in {child.state} without an end in sight")
            if self._finished and child.state in RUNNING:
                raise InvariantBroken(f"{child.spec.name} runs on after the end")

    # ------------------------------------------------------------------------------------------------------- events

    def _on_notified(self, event: Notified, now: float) -> None:
        child = self._children[event.name]
        if event.start != child.start or child.state not in RUNNING:
            return
        child.heard_at = now
        if event.state not in ("loading", "ready"):
            return
        before = child.state
        self._move(child, event.state)
        if child.state == "ready" and before != "ready":
            child.ready_since = now
            self._effects.append(Report(name=event.name, what="ready", detail=event.detail))
        elif child.state == "loading":
            child.ready_since = None
            self._effects.append(Report(name=event.name, what="loading", detail=event.detail, progress=event.progress))

    def _on_exited(self, event: Exited, now: float) -> None:
        child = self._children[event.name]
        if event.start != child.start or child.state not in RUNNING:
            return
        was_stable = child.ready_since is not None and now - child.ready_since >= STABLE_AFTER_S
        was_ready = child.ready_since is not None
        child.ready_since = None
        self._move(child, "exit")
        if child.state == "stopped":
            child.deadline = None
            self._effects.append(Report(name=event.name, what="stopped", detail=_how_it_ended(event.code)))
            return
        child.quick_ends = 0 if was_stable else child.quick_ends + 1
        child.pause_s = FIRST_PAUSE_S if was_stable else min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (child.quick_ends - 1))
        child.deadline = now + child.pause_s
        self._effects.append(Report(name=event.name, what="exited", detail=_how_it_ended(event.code)))
        refused = event.code == EXIT_REFUSED_SETTINGS and not was_ready
        if not self._was_ready and (refused or child.quick_ends >= STARTS_BEFORE_GIVING_UP):
            self._code = EXIT_REFUSED_SETTINGS if refused else 1
            self._begin_stopping()

    def _on_stop_asked(self, now: float) -> None:
        if self._stopping:
            self._killing_all = True
        self._begin_stopping()

    def _begin_stopping(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._effects.append(Stopping())

    # -------------------------------------------------------------------------------------------------- what is due

    def _settle(self, now: float) -> None:
        """Bring everything to where it has to be at `now`."""
        if not self._begun or self._finished:
            return
        if self._stopping:
            self._stop_stages(now)
        else:
            self._kill_silent(now)
            self._start_due(now)
            self._announce_ready()
        self._kill_overdue(now)
        if self._stopping and all(child.state == "stopped" for child in self._children.values()):
            self._finished = True
            self._effects.append(Finished(code=self._code))

    def _start_due(self, now: float) -> None:
        """A restart waits for its pause alone; a first start waits for the stages below."""
        unready = [child.spec.start_stage for child in self._children.values() if child.state != "ready"]
        stage = min(unready, default=None)
        for child in self._children.values():
            due = child.state == "backoff" and child.deadline is not None and now >= child.deadline
            if due or (child.state == "waiting" and child.spec.start_stage == stage):
                self._move(child, "start")
                child.start += 1
                child.heard_at, child.deadline, child.killed = now, None, False
                self._effects.append(Spawn(name=child.spec.name, start=child.start))
                self._effects.append(
                    Report(name=child.spec.name, what="starting", detail=f"start {child.start}" if child.start > 1 else "")
                )

    def _kill_silent(self, now: float) -> None:
        for child in self._children.values():
            bound = child.spec.freeze_s if child.state == "ready" else child.spec.loading_freeze_s
            if child.state in ("starting", "loading", "ready") and now - child.heard_at >= bound:
                self._move(child, "silent")
                child.ready_since, child.deadline = None, now
                self._effects.append(Report(name=child.spec.name, what="frozen", detail=f"silent for {now - child.heard_at:.0f} s"))

    def _stop_stages(self, now: float) -> None:
        """Stop the highest stage in which something still runs; all of them when in a hurry."""
        for child in self._children.values():
            if child.state in ("waiting", "backoff"):
                child.deadline = None
                self._move(child, "stop")
        running = [child.spec.stop_stage for child in self._children.values() if child.state != "stopped"]
        stage = max(running, default=None)
        for child in self._children.values():
            if child.state in ("starting", "loading", "ready", "killing") and (self._killing_all or child.spec.stop_stage == stage):
                was_killed = child.state == "killing"
                self._move(child, "stop")
                child.deadline = now if was_killed else now + child.spec.drain_s
                if not (was_killed or self._killing_all):
                    self._effects.append(Signal(name=child.spec.name, force=False))
                    self._effects.append(Report(name=child.spec.name, what="stopping"))
            if child.state == "stopping" and self._killing_all:
                child.deadline = now

    def _kill_overdue(self, now: float) -> None:
        """SIGKILL what was to be gone by now; again after a while, though once is enough for all but a stuck kernel."""
        for child in self._children.values():
            if child.state in ("killing", "stopping") and child.deadline is not None and now >= child.deadline:
                if child.state == "stopping" and not child.killed and not self._killing_all:
                    self._effects.append(Report(name=child.spec.name, what="overdue"))
                self._effects.append(Signal(name=child.spec.name, force=True))
                child.killed = True
                child.deadline = now + child.spec.freeze_s

    def _announce_ready(self) -> None:
        if not self._was_ready and all(child.state == "ready" for child in self._children.values()):
            self._was_ready = True
            self._effects.append(AllReady())

    def _forgive_own_pause(self, now: float) -> None:
        missed = now - self._now - 2 * TICK_S
        if missed > 0.0 and self._now > 0.0:
            for child in self._children.values():
                child.heard_at += missed
        self._now = max(self._now, now)

    def _move(self, child: _Child, given: ChildInput) -> None:
        after = TRANSITIONS.get((child.state, given))
        if after is None:
            raise InvariantBroken(f"{child.spec.name}: {given} in state {child.state}")
        child.state = after


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "could not be started"
    return f"signal {-code}" if code < 0 else f"exit status {code}"
