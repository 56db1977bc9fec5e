"""A whole mesh of real processes that are meant to die: two prefill and two decode workers, two gateways, NATS and Valkey.

What dies is started again at once under the same id, as a supervisor would, without its failpoint unless that one stays. What
was stopped stays so for a while: when it wakes up it must find itself fenced.
"""

import asyncio
import re
import secrets
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.faults.member import Member
from tests.faults.two_hosts import Wire, two_hosts
from tests.faults.world import World
from tests.servers import RunningServer, free_port, running_nats, running_valkey

READY_TIMEOUT_S = 110
PASSES_TIMEOUT_S = 20
FREEZE_S = 8.0
"""How long a frozen process stays so before it wakes up: well past every bound for noticing it."""
WORKERS = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
GATEWAYS = ("g0", "g1")
_SAMPLE = re.compile(r"^(\w+)(\{[^}]*\})? (\S+)$", re.MULTILINE)


@dataclass
class FaultMesh:
    """`wire` lies between the two hosts where there are two. `worker_flags` start another worker of this mesh. While `sleep_on`
    is set, nobody who was frozen wakes up."""

    nats: RunningServer
    valkey: RunningServer
    members: dict[str, Member]
    folder: Path
    worker_flags: list[str]
    wire: Wire | None
    deaths: int = 0
    freezes: int = 0
    sleep_on: bool = False
    others_ended: asyncio.Event = field(default_factory=asyncio.Event)
    _resting: set[str] = field(default_factory=set)
    _asleep_since: dict[str, float] = field(default_factory=dict)

    @property
    def gateway_urls(self) -> list[str]:
        return [self.members[name].url for name in GATEWAYS]

    def taken_down(self) -> int:
        """Members that died or stopped, other than by `restart`."""
        self._notice()
        return self.deaths + self.freezes

    async def keep_alive(self) -> None:
        """What a supervisor does: replace the dead. And what was frozen wakes up after its time."""
        while True:
            self._notice()
            now = asyncio.get_running_loop().time()
            for name, since in list(self._asleep_since.items()):
                if now - since > FREEZE_S and not self.sleep_on:
                    del self._asleep_since[name]
                    if self.members[name].is_running:
                        self.members[name].signal(signal.SIGCONT)
            await asyncio.sleep(0.05)

    def _notice(self) -> None:
        for member in self.members.values():
            if member.name in self._resting:
                continue
            if not member.is_running:
                self.deaths += 1
                self._asleep_since.pop(member.name, None)
                member.start()
            elif member.is_stopped and not member.sleeps:
                member.sleeps = True
                self.freezes += 1
                self._asleep_since[member.name] = asyncio.get_running_loop().time()
            elif not member.is_stopped:
                member.sleeps = False

    async def arm(self, failpoints: Mapping[str, str], *, stay: bool = False) -> None:
        """Restart members in order, with their failpoints; returns when the mesh is whole."""
        for name in failpoints:
            self.members[name].failpoints = failpoints[name]
        await self.restart(*failpoints)
        for name in failpoints:
            self.members[name].failpoints = failpoints[name] if stay else ""

    async def restart(self, *names: str) -> None:
        """Stop members in order, all at once, and start them again; returns when the mesh is whole."""
        self._resting.update(names)
        try:
            for name in names:
                self.members[name].signal(signal.SIGTERM)
            async with asyncio.timeout(30):
                while any(self.members[name].is_running for name in names):
                    await asyncio.sleep(0.02)
            for name in names:
                self.members[name].start()
                self.members[name].skip_log()
        finally:
            self._resting.difference_update(names)
        await self.whole()

    async def passes(self, names: Sequence[str], point: str) -> bool:
        """Wait until one of these members has paused at a failpoint."""
        with suppress(TimeoutError):
            async with asyncio.timeout(PASSES_TIMEOUT_S):
                while not any(self.members[name].has_passed(point) for name in names):
                    await asyncio.sleep(0.005)
                return True
        return False

    async def whole(self) -> None:
        """Every member is ready, and every prefill worker paired with every decode worker."""
        decodes = sum(role == "decode" for role in WORKERS.values())
        async with httpx.AsyncClient(timeout=2) as client, asyncio.timeout(READY_TIMEOUT_S):
            for name, member in self.members.items():
                while not await _answers(client, f"{member.url}/readyz"):
                    assert member.starts > 1 or member.is_running, f"{name} did not start: {member.tail()}"
                    await asyncio.sleep(0.05)
                while WORKERS.get(name) == "prefill" and await self.metric(name, "segue_peers") < decodes:
                    await asyncio.sleep(0.05)

    async def metric(self, name: str, metric: str) -> float:
        """The sum of a metric's series at one member."""
        return (await self.metrics(name)).get(metric, 0.0)

    async def metrics(self, name: str) -> dict[str, float]:
        """Each series under its name with labels, and the sum of each metric under its bare name."""
        values: dict[str, float] = {}
        async with httpx.AsyncClient(timeout=5) as client:
            text = (await client.get(f"{self.members[name].url}/metrics")).text
        for found in _SAMPLE.finditer(text):
            values[found[1]] = values.get(found[1], 0.0) + float(found[3])
            if found[2]:
                values[found[1] + found[2]] = float(found[3])
        return values

    def stop(self) -> None:
        for member in self.members.values():
            if member.is_running:
                member.signal(signal.SIGCONT)
                member.signal(signal.SIGKILL)
        for member in self.members.values():
            if member.process is not None:
                member.process.wait()


@asynccontextmanager
async def fault_mesh(world: World) -> AsyncIterator[FaultMesh]:
    folder = Path(tempfile.mkdtemp(prefix="segue-faults-"))
    key = folder / "cluster.key"
    key.write_text(secrets.token_hex(32))
    async with AsyncExitStack() as closing:
        wire = await closing.enter_async_context(two_hosts()) if world.two_hosts else None
        host = wire.near if wire is not None else "127.0.0.1"
        nats = await closing.enter_async_context(running_nats(host=host))
        valkey = await closing.enter_async_context(running_valkey(host=host))
        shared = ["--mesh", f"f{secrets.token_hex(3)}", "--nats-url", nats.url, "--redis-url", valkey.url]
        flags = [*shared, "--cluster-key-file", str(key), "--threads", "1", "--drain-s", "10", *world.flags]
        members = [_worker(name, flags, folder, wire) for name in WORKERS]
        members += [_gateway(name, shared, folder) for name in GATEWAYS]
        mesh = FaultMesh(nats, valkey, {member.name: member for member in members}, folder, flags, wire)
        closing.callback(mesh.stop)
        for member in members:
            member.start()
        await mesh.whole()
        keeping = asyncio.create_task(mesh.keep_alive())
        try:
            yield mesh
        finally:
            keeping.cancel()
            await asyncio.wait([keeping])


def _worker(name: str, flags: Sequence[str], folder: Path, wire: Wire | None) -> Member:
    """Decode workers live at the far end of the wire, where there is one."""
    host, prefix, port = "127.0.0.1", (), free_port()
    if wire is not None:
        far = WORKERS[name] == "decode"
        host, prefix = (wire.far, wire.run_far) if far else (wire.near, ())
    command = [*prefix, sys.executable, "-m", f"services.{WORKERS[name]}", "--worker-id", name, "--host", host]
    return Member(name, [*command, *flags, "--status-port", str(port)], host, port, folder / f"{name}.log")


def _gateway(name: str, shared: Sequence[str], folder: Path) -> Member:
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "services.gateway",
        "--gateway-id",
        name,
        *shared,
        "--port",
        str(port),
        "--sse-keepalive",
        "1",
        "--placement",
        "split",
    ]
    return Member(name, command, "127.0.0.1", port, folder / f"{name}.log")


async def _answers(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(url)).status_code == 200
    except httpx.HTTPError:
        return False
