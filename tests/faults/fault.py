"""What a fault is: where it happens, what else happens beside the requests, and in which kind of mesh."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from tests.faults.fault_mesh import FaultMesh
from tests.faults.world import SYNTHETIC, World

Act = Callable[[FaultMesh], Awaitable[Sequence[str]]]
"""Does something to a mesh that runs; returns in words what it expected and did not find."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`armed` members start with a failpoint; where it `stays_armed`, whatever takes their place too. `before` happens ahead of
    the requests, `inject` beside them, once they are under way. `leaves` is a series of the workers' metrics that the
    fault must have raised, else it did not happen."""

    name: str
    group: str
    world: World = SYNTHETIC
    armed: tuple[tuple[str, str], ...] = ()
    stays_armed: bool = False
    before: Act | None = None
    inject: Act | None = None
    leaves: str | None = None
    is_everyday: bool = False


def armed(names: Sequence[str], failpoint: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, failpoint) for name in names)
