"""Control connections between workers: ordered and whole, or lost; a network that parts two workers is silent first.

When a connection ends, each side still gets what had reached it, then notices at its own time. A frozen worker's socket
takes messages that it reads when it wakes up.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from common.simulation.simulated_process import SimulatedProcess
from common.simulation.surroundings import Surroundings
from common.values.ids import WorkerId
from common.values.transfer import Tier


class Connection:
    """One connection. `channels[worker]` is what is on its way to that worker as (arrival, payload); None is the end."""

    def __init__(self, number: int, ends: tuple[WorkerId, WorkerId], tier: Tier) -> None:
        self.number = number
        self.ends = ends
        self.tier = tier
        self.broken = False
        self.channels: dict[WorkerId, deque[tuple[float, bytes | None]]] = {end: deque() for end in ends}

    def peer_of(self, worker: WorkerId) -> WorkerId:
        return self.ends[1] if worker == self.ends[0] else self.ends[0]


class ConnectionEnd(Protocol):
    """What a connection needs of the worker at its end."""

    @property
    def process(self) -> SimulatedProcess: ...
    def on_connected(self, connection: Connection) -> None: ...
    def on_payload(self, connection: Connection, payload: bytes) -> None: ...
    def on_connection_end(self, connection: Connection) -> None: ...


class SimulatedConnections:
    """The network between the workers of one mesh."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._ends: dict[WorkerId, ConnectionEnd] = {}
        self._parted_until: dict[tuple[WorkerId, WorkerId], float] = {}
        self._number = 0
        self.connections: list[Connection] = []

    def add(self, worker: WorkerId, end: ConnectionEnd) -> None:
        self._ends[worker] = end

    def are_parted(self, a: WorkerId, b: WorkerId) -> bool:
        return self._around.now < self._parted_until.get((min(a, b), max(a, b)), 0.0)

    def part(self, a: WorkerId, b: WorkerId, seconds: float) -> None:
        self._around.note(a, f"is cut off from {b} for {seconds:.2f} s")
        self._parted_until[min(a, b), max(a, b)] = self._around.now + seconds

    def dial(self, caller: WorkerId, callee: WorkerId, refused: Callable[[], None]) -> None:
        """Both sides are told, or the caller that it was refused."""
        caller_process, callee_process = self._ends[caller].process, self._ends[callee].process
        if not callee_process.awake or self.are_parted(caller, callee):
            caller_process.after(self._around.random.choice([0.001, 1.0, 5.0]), "dial", refused)
            return
        self._number += 1
        tier: Tier = self._around.random.choice(["shm", "tcp"])
        connection = Connection(self._number, (caller, callee), tier)
        self.connections.append(connection)
        for end in (self._ends[caller], self._ends[callee]):
            end.process.after(self._around.takes(0.002), "dial", partial(end.on_connected, connection))

    def send(self, connection: Connection, sender: WorkerId, payload: bytes) -> None:
        if not connection.broken:
            self._put(connection, connection.peer_of(sender), payload)

    def end(self, connection: Connection, *, by: WorkerId | None) -> None:
        """Closed by one side (its peer notices), or broken (both do). Of what is under way a first part still arrives."""
        if connection.broken:
            return
        connection.broken = True
        self.connections.remove(connection)
        for worker, channel in connection.channels.items():
            if worker == by:
                channel.clear()
                continue
            for _ in range(self._around.random.randint(0, len(channel)) if channel else 0):
                channel.pop()
            self._put(connection, worker, None)

    def of(self, worker: WorkerId) -> list[Connection]:
        return [connection for connection in self.connections if worker in connection.ends]

    def _put(self, connection: Connection, to: WorkerId, payload: bytes | None) -> None:
        channel = connection.channels[to]
        earliest = channel[-1][0] if channel else 0.0
        arrival = max(self._around.now + self._around.takes(self._around.strength.message_delay_s), earliest)
        channel.append((arrival, payload))
        if len(channel) == 1:
            self._around.schedule.at(arrival, partial(self._arrive, connection, to, arrival))

    def _arrive(self, connection: Connection, to: WorkerId, arrival: float) -> None:
        """`arrival` tells an old plan from a new one, after the channel was cut short."""
        channel = connection.channels[to]
        if not channel or channel[0][0] != arrival:
            return
        parted_until = self._parted_until.get((min(connection.ends), max(connection.ends)), 0.0)
        if self._around.now < parted_until:
            self._around.schedule.at(parted_until, partial(self._arrive, connection, to, arrival))
            return
        _, payload = channel.popleft()
        end = self._ends[to]
        source = f"connection {connection.number}"
        if payload is None:
            end.process.take(source, partial(end.on_connection_end, connection))
        else:
            end.process.take(source, partial(end.on_payload, connection, payload))
        if channel:
            self._around.schedule.at(channel[0][0], partial(self._arrive, connection, to, channel[0][0]))
