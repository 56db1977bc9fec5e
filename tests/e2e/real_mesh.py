"""Real workers as processes, real NATS and Valkey, and a gateway's mesh client in the test: tokens without text between."""

import asyncio
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from common.adapters.nats_broker import NatsBroker
from common.adapters.redis_store import RedisStore
from common.protocol.subjects import Names
from common.runtime.incarnation import make_incarnation
from common.values.ids import GatewayId
from services.gateway.mesh_client import LiveMesh
from tests.servers import free_port
from tools.serve_reachable import until_ready

ROOT = Path(__file__).parents[2]
READY_TIMEOUT_S = 110


@dataclass
class RealMesh:
    """Worker processes of one mesh, and `client` to reach them. `logs[name]` is what a worker wrote."""

    folder: Path
    nats_url: str
    redis_url: str
    name: str
    client: LiveMesh | None = None
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    commands: dict[str, Sequence[str]] = field(default_factory=dict)
    gateways: dict[str, str] = field(default_factory=dict)
    """Name → URL."""

    def start_worker(self, name: str, role: str, *arguments: str) -> None:
        key = self.folder / "cluster.key"
        if not key.exists():
            key.write_text(secrets.token_hex(32))
        service = "prefill" if role == "prefill" else "decode"
        command = [
            *(sys.executable, "-m", f"services.{service}", "--role", role, "--worker-id", name, "--mesh", self.name),
            *("--nats-url", self.nats_url, "--redis-url", self.redis_url, "--cluster-key-file", str(key)),
            *("--threads", "1", "--drain-s", "2", *arguments),
        ]
        self._start(name, command)

    def start_gateway(self, name: str, *arguments: str, port: int | None = None) -> str:
        """Its URL. `until_served` waits for it."""
        port = port or free_port()
        command = [
            *(sys.executable, "-m", "services.gateway", "--gateway-id", name, "--mesh", self.name, "--port", str(port)),
            *("--nats-url", self.nats_url, "--redis-url", self.redis_url, "--placement", "split", *arguments),
        ]
        self._start(name, command)
        self.gateways[name] = f"http://127.0.0.1:{port}"
        return self.gateways[name]

    async def until_served(self) -> None:
        """Every gateway says that it is ready."""
        async with asyncio.timeout(READY_TIMEOUT_S):
            for url in self.gateways.values():
                waiting = asyncio.ensure_future(until_ready("127.0.0.1", int(url.rpartition(":")[2])))
                while not waiting.done():
                    for process_name, process in self.processes.items():
                        assert process.poll() is None, f"{process_name} ended: {self.log(process_name)}"
                    await asyncio.wait([waiting], timeout=0.2)

    async def restart(self, name: str) -> None:
        """SIGTERM, a clean end, and the same command again."""
        process = self.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, READY_TIMEOUT_S) == 0, self.log(name)[-3000:]
        self._start(name, self.commands[name])

    def _start(self, name: str, command: Sequence[str]) -> None:
        self.commands[name] = command
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    async def settled(self) -> None:
        """All started workers are ready, seen by the client, and prefill workers see every decode worker."""
        assert self.client is not None
        async with asyncio.timeout(READY_TIMEOUT_S):
            while True:
                for name, process in self.processes.items():
                    assert process.poll() is None, f"{name} ended: {self.log(name)}"
                seen = {str(s.worker): s for s in self.client.core.registry.all() if s.state == "ready"}
                decodes = {name for name, s in seen.items() if s.role == "decode"}
                paired = all(decodes <= set(s.peers) for s in seen.values() if s.role == "prefill")
                if set(self.processes) <= set(seen) and paired and self.client.cards():
                    return
                await asyncio.sleep(0.05)

    def stop(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for name, process in self.processes.items():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise AssertionError(f"{name} did not stop: {self.log(name)[-2000:]}") from None


@asynccontextmanager
async def mesh_client(mesh: RealMesh) -> AsyncIterator[LiveMesh]:
    """A gateway's client in this process, for the running event loop."""
    broker = await NatsBroker.connect([mesh.nats_url], name="test-gateway")
    store = await RedisStore.connect([mesh.redis_url])
    try:
        async with asyncio.TaskGroup() as tasks:
            client = LiveMesh(
                gateway=GatewayId(f"test-{secrets.token_hex(4)}"),
                incarnation=make_incarnation(),
                broker=broker,
                store=store,
                names=Names(mesh.name),
            )
            started = asyncio.Event()
            running = tasks.create_task(client.run(started))
            await started.wait()
            mesh.client = client
            yield client
            running.cancel()
    finally:
        mesh.client = None
        await broker.close()
        await store.close()


def make_mesh(nats_url: str, redis_url: str) -> RealMesh:
    return RealMesh(Path(tempfile.mkdtemp(prefix="segue-e2e-")), nats_url, redis_url, f"t{secrets.token_hex(4)}")


def cores() -> Sequence[int]:
    return sorted(os.sched_getaffinity(0))
