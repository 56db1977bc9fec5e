"""A whole mesh of real processes that are meant to die: two prefill and two decode workers, two gateways, NATS and Valkey.

What dies is started again at once under the same id, without its failpoint, as a supervisor would. What was stopped stays so
until the test lets it go on: it must then find itself fenced.
"""

import asyncio
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.servers import RunningServer, free_port, running_nats, running_valkey

ROOT = Path(__file__).parents[2]
READY_TIMEOUT_S = 110
WORKERS = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
GATEWAYS = ("g0", "g1")
_SAMPLE = re.compile(r"^(\w+)(\{[^}]*\})? (\S+)$", re.MULTILINE)


@dataclass
class Member:
    """One service process. `port` is where it answers HTTP: a worker's status port, or a gateway's own."""

    name: str
    command: list[str]
    port: int
    log: Path
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0

    def start(self, failpoints: str = "") -> None:
        environment = {**os.environ, "SEGUE_FAILPOINTS": failpoints}
        if not failpoints:
            del environment["SEGUE_FAILPOINTS"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
        self.starts += 1

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    @property
    def is_stopped(self) -> bool:
        assert self.process is not None
        try:
            return Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
        except OSError:
            return False

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


@dataclass
class FaultMesh:
    nats: RunningServer
    valkey: RunningServer
    members: dict[str, Member]
    deaths: int = 0
    _resting: set[str] = field(default_factory=set)

    @property
    def gateway_urls(self) -> list[str]:
        return [f"http://127.0.0.1:{self.members[name].port}" for name in GATEWAYS]

    async def keep_alive(self) -> None:
        """What a supervisor does: replace the dead."""
        while True:
            for member in self.members.values():
                if not member.is_running and member.name not in self._resting:
                    self.deaths += 1
                    member.start()
            await asyncio.sleep(0.1)

    async def restart(self, name: str, failpoints: str = "") -> None:
        """Stop a member in order and start it again, armed or not; returns when the mesh is whole."""
        member = self.members[name]
        assert member.process is not None
        self._resting.add(name)
        try:
            member.signal(signal.SIGTERM)
            async with asyncio.timeout(30):
                while member.is_running:
                    await asyncio.sleep(0.02)
            member.start(failpoints)
        finally:
            self._resting.discard(name)
        await self.whole()

    async def whole(self) -> None:
        """Every member is ready, and every prefill worker paired with every decode worker."""
        decodes = sum(role == "decode" for role in WORKERS.values())
        async with httpx.AsyncClient(timeout=2) as client, asyncio.timeout(READY_TIMEOUT_S):
            for name, member in self.members.items():
                while not await _answers(client, f"http://127.0.0.1:{member.port}/readyz"):
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
            text = (await client.get(f"http://127.0.0.1:{self.members[name].port}/metrics")).text
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
async def fault_mesh(*worker_flags: str) -> AsyncIterator[FaultMesh]:
    """`worker_flags` are further flags of each worker."""
    folder = Path(tempfile.mkdtemp(prefix="segue-faults-"))
    key = folder / "cluster.key"
    key.write_text(secrets.token_hex(32))
    async with running_nats() as nats, running_valkey() as valkey:
        shared = ["--mesh", f"f{secrets.token_hex(3)}", "--nats-url", nats.url, "--redis-url", valkey.url]
        members = {}
        for name, role in WORKERS.items():
            port = free_port()
            command = [sys.executable, "-m", f"services.{role}", "--worker-id", name, *shared, "--cluster-key-file", str(key)]
            command += ["--threads", "1", "--drain-s", "10", "--status-port", str(port), *worker_flags]
            members[name] = Member(name, command, port, folder / f"{name}.log")
        for name in GATEWAYS:
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
            ]
            members[name] = Member(name, command, port, folder / f"{name}.log")
        mesh = FaultMesh(nats, valkey, members)
        try:
            for member in members.values():
                member.start()
            await mesh.whole()
            keeping = asyncio.create_task(mesh.keep_alive())
            try:
                yield mesh
            finally:
                keeping.cancel()
                await asyncio.wait([keeping])
        finally:
            mesh.stop()


async def _answers(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(url)).status_code == 200
    except httpx.HTTPError:
        return False
