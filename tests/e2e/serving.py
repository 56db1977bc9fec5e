"""`segue serve` as its user runs it: a process of its own, found by what it prints, ended by signals."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.servers import free_port

ROOT = Path(__file__).parents[2]
READY_TIMEOUT_S = 150


@dataclass
class Serving:
    """A running `segue serve`. `output` grows while it runs; `pids` are its children by their config file's name."""

    process: subprocess.Popen[str]
    port: int
    run_dir: Path
    lines: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def children(self) -> dict[int, str]:
        """Living processes whose command line names our run folder, or the parent we know."""
        found: dict[int, str] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if state != "Z" and int(entry.name) != self.process.pid and (str(self.run_dir) in command or self._is_child(entry)):
                found[int(entry.name)] = command
        return found

    def child(self, part: str) -> int:
        return next(pid for pid, command in self.children().items() if part in command)

    def _is_child(self, entry: Path) -> bool:
        return (entry / "stat").read_text().rsplit(")", 1)[1].split()[1] == str(self.process.pid)

    def log(self, name: str) -> str:
        return "".join(path.read_text(errors="replace") for path in self.run_dir.rglob(f"{name}*.log"))

    async def until(self, text: str, *, timeout_s: float = READY_TIMEOUT_S, times: int = 1) -> None:
        async with asyncio.timeout(timeout_s):
            while self.output.count(text) < times:
                assert self.process.poll() is None or text in self.output, self.output
                await asyncio.sleep(0.05)

    async def ended(self, timeout_s: float = 40) -> int:
        async with asyncio.timeout(timeout_s):
            while self.process.poll() is None:
                await asyncio.sleep(0.05)
        return int(self.process.returncode)

    async def nothing_left(self) -> None:
        """No process of ours lives, the port is free, and shared memory holds nothing of ours."""
        async with asyncio.timeout(10):
            while self.children():
                await asyncio.sleep(0.05)
        assert re.findall(r"ucx|segue", " ".join(os.listdir("/dev/shm"))) == []


@asynccontextmanager
async def serving(*arguments: str, port: int | None = None) -> AsyncIterator[Serving]:
    run_dir = Path(tempfile.mkdtemp(prefix="segue-serve-"))
    port = port or free_port()
    command = [sys.executable, "-m", "tools.command", "serve", *arguments, "--port", str(port), "--run-dir", str(run_dir)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    running = Serving(process, port, run_dir)
    reader = asyncio.get_running_loop().run_in_executor(None, _read, process, running.lines)
    try:
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            deadline = time.monotonic() + 40
            while process.poll() is None and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
            process.kill()
        await reader
        process.wait()


def _read(process: subprocess.Popen[str], lines: list[str]) -> None:
    assert process.stdout is not None
    lines.extend(line.rstrip() for line in process.stdout)
