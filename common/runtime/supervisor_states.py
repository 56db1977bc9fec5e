"""The life of one supervised process, as a table, and the words between supervisor machine and its shell.

The table is the whole truth about what may follow what; `supervisor` adds the clocks and the order between processes.
"""

from dataclasses import dataclass, field
from typing import Literal

from common.policy.watchdog import process_frozen_after_s

ChildState = Literal["waiting", "starting", "loading", "ready", "killing", "backoff", "stopping", "stopped"]
"""`waiting`: its stage has not begun. `starting`: spawned, not heard of. `killing`: SIGKILL sent, its end awaited.
`backoff`: ended, to be started again. `stopping`: asked to end for good. `stopped`: over."""
ChildInput = Literal["start", "loading", "ready", "exit", "silent", "stop"]

TRANSITIONS: dict[tuple[ChildState, ChildInput], ChildState] = {
    ("waiting", "start"): "starting",
    ("waiting", "stop"): "stopped",
    ("starting", "loading"): "loading",
    ("starting", "ready"): "ready",
    ("starting", "exit"): "backoff",
    ("starting", "silent"): "killing",
    ("starting", "stop"): "stopping",
    ("loading", "loading"): "loading",
    ("loading", "ready"): "ready",
    ("loading", "exit"): "backoff",
    ("loading", "silent"): "killing",
    ("loading", "stop"): "stopping",
    ("ready", "loading"): "loading",
    ("ready", "ready"): "ready",
    ("ready", "exit"): "backoff",
    ("ready", "silent"): "killing",
    ("ready", "stop"): "stopping",
    ("killing", "loading"): "killing",
    ("killing", "ready"): "killing",
    ("killing", "exit"): "backoff",
    ("killing", "stop"): "stopping",
    ("backoff", "start"): "starting",
    ("backoff", "stop"): "stopped",
    ("stopping", "loading"): "stopping",
    ("stopping", "ready"): "stopping",
    ("stopping", "stop"): "stopping",
    ("stopping", "exit"): "stopped",
    ("stopped", "stop"): "stopped",
}
RUNNING: frozenset[ChildState] = frozenset({"starting", "loading", "ready", "killing", "stopping"})
"""States in which a process exists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """`start_stage`: a stage starts when all of the ones below are ready. `stop_stage`: one stops only once all of the ones
    above have ended. (A gateway may start with the workers, and stop before them.)

    `loading_freeze_s` is the longest silence before it is ready, `freeze_s` after. `drain_s` is how long it may take to
    end by itself.
    """

    name: str
    start_stage: int
    stop_stage: int
    drain_s: float = 30.0
    freeze_s: float = field(default_factory=process_frozen_after_s)
    loading_freeze_s: float = 180.0


# ------------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """Start the first stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notified:
    """The child's start number `start` said this. `state` None is a mere heartbeat."""

    name: str
    start: int
    state: Literal["loading", "ready", "draining"] | None = None
    detail: str = ""
    progress: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Exited:
    """`code` is negative for a signal, as subprocess has it; None where the process could not be made."""

    name: str
    start: int
    code: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TimerFired:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class StopAsked:
    """The first one drains, the second one kills."""


SupervisorEvent = Begin | Notified | Exited | TimerFired | StopAsked

# ------------------------------------------------------------------------------------------------------------ effects


@dataclass(frozen=True, slots=True, kw_only=True)
class Spawn:
    name: str
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """`force`: SIGKILL, else SIGTERM."""

    name: str
    force: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Something that a person wants to know."""

    name: str
    what: Literal["starting", "loading", "ready", "exited", "frozen", "overdue", "stopping", "stopped"]
    detail: str = ""
    progress: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReady:
    """Every process is ready, for the first time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """Stopping began: take no more connections."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """All have ended. `code` is the exit status of the whole: 0 after a wished stop, 1 where a process cannot be kept
    running, 2 where one refused its settings."""

    code: int


SupervisorEffect = Spawn | Signal | Report | AllReady | Stopping | Finished
