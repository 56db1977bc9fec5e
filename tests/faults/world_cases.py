"""Deaths in other kinds of mesh: pools that hold little more than one sequence, and KV that moves in messages."""

from tests.faults.fault import Fault
from tests.faults.world import OVER_TCP, OVER_UCX, SMALL_POOLS, World

_TRANSFER = (
    ("p0", "offer.sent", "kill"),
    ("p0", "ready.sent", "kill"),
    ("p0", "ready.sent", "stop"),
    ("p0", "last.sent", "kill"),
    ("d0", "pull.started", "kill"),
    ("d0", "pull.started", "stop"),
    ("d0", "last.received", "kill"),
)
PREEMPTIONS = "segue_preemptions_total"


def world_faults() -> list[Fault]:
    return [*_small_pools(), *_message_tiers(OVER_TCP), *_message_tiers(OVER_UCX)]


def _small_pools() -> list[Fault]:
    return [
        _crowded("nobody dies, all are preempted", leaves=PREEMPTIONS),
        _crowded("d0 killed at its first preemption", ("d0", "preempted=kill")),
        _crowded("d0 frozen at its first preemption", ("d0", "preempted=stop")),
        _crowded("p0 killed at last.sent, pools small", ("p0", "last.sent=kill@3"), leaves=PREEMPTIONS),
    ]


def _crowded(name: str, *armed: tuple[str, str], leaves: str | None = None) -> Fault:
    return Fault(name=name, group="pools too small", world=SMALL_POOLS, armed=armed, leaves=leaves)


def _message_tiers(world: World) -> list[Fault]:
    """A peer that dies after READY is gone while its blocks are on their way: what came of them is cut off."""
    return [
        Fault(
            name=f"{name} {'killed' if action == 'kill' else 'frozen'} at {point}, {world.name}",
            group=world.name,
            world=world,
            armed=((name, f"{point}={action}@2"),),
        )
        for name, point, action in _TRANSFER
    ]
