"""What must stay flat in a soak: the memory of processes that survive, and the store's keys beside the requests that made them."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from redis.asyncio import Redis

from common.protocol.request_record import ENDED_TTL_S
from tests.faults.fault_mesh import FaultMesh

EACH_S = 5.0
WARM_UP_SHARE = 0.3
"""Of a process's life: caches fill, allocators settle."""
LEAST_POINTS = 8


@dataclass
class Figures:
    """Memory in MiB by process (member and start), and (seconds, keys, requests asked so far)."""

    memory: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    keys: list[tuple[float, int, int]] = field(default_factory=list)

    def lines(self) -> list[str]:
        lines = []
        for name, points in sorted(self.memory.items()):
            warm = points[int(len(points) * WARM_UP_SHARE) :]
            if len(warm) >= LEAST_POINTS:
                life = (points[-1][0] - points[0][0]) / 60
                lines.append(
                    f"{name}: {warm[0][1]:.1f} to {warm[-1][1]:.1f} MiB, {slope(warm) * 60:+.2f} MiB a minute ({life:.1f} min)"
                )
        return lines + self._keys_a_request()

    def _keys_a_request(self) -> list[str]:
        """Records of ended requests stay for a while: keys are held against the requests within that time."""
        shares = []
        for seconds, keys, asked in self.keys:
            before = max((number for at, _, number in self.keys if at <= seconds - ENDED_TTL_S), default=0)
            if asked > before:
                shares.append((seconds, keys / (asked - before)))
        warm = shares[int(len(shares) * WARM_UP_SHARE) :]
        if len(warm) < LEAST_POINTS:
            return []
        change = slope(warm) * 60
        return [f"keys a request within {ENDED_TTL_S:.0f} s: {warm[0][1]:.2f} to {warm[-1][1]:.2f}, {change:+.3f} a minute"]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the least squares line, per unit of x."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


async def watch(mesh: FaultMesh, figures: Figures, asked: Callable[[], int]) -> None:
    """Looks every few seconds until cancelled."""
    client = Redis.from_url(mesh.valkey.url)
    try:
        while True:
            now = time.monotonic()
            for name, member in mesh.members.items():
                if resident := member.resident_bytes:
                    figures.memory.setdefault(f"{name} (start {member.starts})", []).append((now, resident / 2**20))
            figures.keys.append((now, int(await client.dbsize()), asked()))
            used = await client.info("memory")
            figures.memory.setdefault("valkey", []).append((now, int(used["used_memory"]) / 2**20))
            await asyncio.sleep(EACH_S)
    finally:
        await client.aclose()
