"""How bad a simulated world is: every strength is drawn anew for each seed, often zero, else over orders of magnitude.

Worlds that all have the same mild weather hide bugs: some need one precise fault in calm weather, others need storms.
"""

from dataclasses import dataclass, replace
from random import Random


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultStrength:
    """Times in seconds, shares between 0 and 1, and counts of single faults.

    `snapshot_s` is the shortest time between two snapshots. `message_loss` and `message_twice` are shares of the broker's
    messages, `corruption` of the blocks that are copied, `leaving` of the clients (they leave, or end a choice early).
    `impatience` is the share of clients that leave a gateway which has fallen silent and come back at another,
    `abandonment` of those that never come back to what a gateway left behind.
    `deaths`, `freezes`, `hangs` (a step that never ends), `drains` and `role_changes` are of workers. `outages` are of the
    broker's server, `partitions` cut one process off from it, or two workers from each other; `breaks` are of control
    connections with both ends alive.
    """

    message_delay_s: float = 0.001
    message_loss: float = 0.0
    message_twice: float = 0.0
    step_s: float = 0.01
    seal_s: float = 0.001
    copy_s: float = 0.002
    snapshot_s: float = 0.02
    corruption: float = 0.0
    leaving: float = 0.0
    deadlines: float = 0.0
    impatience: float = 0.0
    abandonment: float = 0.0
    deaths: int = 0
    freezes: int = 0
    hangs: int = 0
    drains: int = 0
    role_changes: int = 0
    gateway_deaths: int = 0
    gateway_freezes: int = 0
    outages: int = 0
    partitions: int = 0
    breaks: int = 0
    store_outages: int = 0

    @property
    def single_faults(self) -> int:
        """How many times something breaks; a drain or another role is not a fault."""
        workers = self.deaths + self.freezes + self.hangs
        gateways = self.gateway_deaths + self.gateway_freezes
        return workers + gateways + self.outages + self.partitions + self.breaks + self.store_outages


_COUNTS = (
    *("deaths", "freezes", "hangs", "drains"),
    *("gateway_deaths", "gateway_freezes"),
    *("outages", "partitions", "breaks", "store_outages"),
)


def without_faults(strength: FaultStrength) -> FaultStrength:
    """Nothing breaks any more; speeds stay, and bytes may still be spoilt."""
    quiet = dict.fromkeys(
        (*_COUNTS, "role_changes", "message_loss", "message_twice", "leaving", "deadlines", "impatience", "abandonment"), 0
    )
    return replace(strength, **quiet)


def draw_strength(random: Random) -> FaultStrength:
    """A third of all worlds has at most one single fault: those must not be noticed by anybody."""
    kind, calm = random.random(), _draw_speeds(random)
    if kind < 0.35:
        fault = random.choice((None, *_COUNTS))
        once = {} if fault is None else {fault: 1}
        return replace(
            calm, corruption=_share(random, 0.01, 0.5), leaving=_share(random, 0.1, 0.8), impatience=_share(random, 0.2, 1.0), **once
        )
    most = 2 if kind < 0.7 else 6
    counts = {name: _count(random, most) for name in _COUNTS}
    return replace(
        calm,
        message_loss=_share(random, 0.002, 0.2),
        message_twice=_share(random, 0.005, 0.3),
        corruption=_share(random, 0.01, 0.5),
        leaving=_share(random, 0.1, 0.8),
        deadlines=_share(random, 0.05, 0.3),
        impatience=_share(random, 0.2, 1.0),
        abandonment=_share(random, 0.05, 0.5),
        **counts,
    )


def _draw_speeds(random: Random) -> FaultStrength:
    return FaultStrength(
        message_delay_s=_between(random, 0.0002, 0.05),
        step_s=_between(random, 0.002, 0.12),
        seal_s=_between(random, 0.0002, 0.03),
        copy_s=_between(random, 0.0002, 0.1),
        snapshot_s=_between(random, 0.02, 0.4),
    )


def _share(random: Random, least: float, most: float) -> float:
    return 0.0 if random.random() < 0.5 else _between(random, least, most)


def _count(random: Random, most: int) -> int:
    return 0 if random.random() < 0.5 else random.randint(1, most)


def _between(random: Random, least: float, most: float) -> float:
    """Every order of magnitude alike."""
    return float(least * (most / least) ** random.random())
