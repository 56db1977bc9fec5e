"""`segue chat` against a real gateway over HTTP: one-shot, piped, refused, and a conversation on a terminal."""

import asyncio
import os
import pty
import sys
from pathlib import Path

from tests.gateway_server import RunningGateway, gateway
from tests.gateway_twin import Script, TwinMesh

ROOT = Path(__file__).resolve().parents[2]


async def _chat(url: str, *arguments: str, stdin: bytes | None = None) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tools.command",
        "chat",
        "--url",
        url,
        *arguments,
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(stdin), 60)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_one_question_as_argument_or_on_standard_input() -> None:
    async with gateway() as running:
        status, out, err = await _chat(running.url, "hello", "there", "--max-tokens", "8")
        assert status == 0
        assert out.strip()
        assert "8 tokens, TTFT" in err
        status, piped, _ = await _chat(running.url, "--max-tokens", "8", stdin=b"hello there\n")
        assert status == 0
        assert piped.strip()
        assert running.mesh.requests[0].prompt == running.mesh.requests[1].prompt
        assert running.mesh.open == {}


async def test_refusals_say_what_to_do() -> None:
    async with gateway(api_keys=("secret",)) as running:
        status, _, err = await _chat(running.url, "hello")
        assert status == 1
        assert "--api-key" in err
        status, out, _ = await _chat(running.url, "hello", "--api-key", "secret", "--max-tokens", "3")
        assert status == 0
        assert out.strip()
        url = running.url
    status, _, err = await _chat(url, "hello")
    assert status == 1
    assert "segue serve" in err
    assert "Traceback" not in err


async def test_ctrl_c_stops_the_answer_and_keeps_the_chat() -> None:
    async with gateway(TwinMesh(script=Script(hold_after=6))) as running:
        terminal = await _Terminal.open(running)
        await terminal.until("> ")
        terminal.type("hello\n")
        await terminal.until_quiet_after(running)
        terminal.type("\x03")
        await terminal.until("stopped)")
        await terminal.until("> ")
        running.mesh.script.hold_after = None
        terminal.type("again\n")
        await terminal.until("tokens/s")
        assert len(running.mesh.requests[1].prompt) > len(running.mesh.requests[0].prompt), "the conversation goes on"
        terminal.type("/reset\n")
        await terminal.until("(forgotten)")
        terminal.type("/exit\n")
        assert await asyncio.wait_for(terminal.process.wait(), 30) == 0
        assert running.mesh.open == {}


async def test_ctrl_c_at_the_prompt_leaves() -> None:
    async with gateway() as running:
        terminal = await _Terminal.open(running)
        await terminal.until("> ")
        async with asyncio.timeout(60):
            while terminal.process.returncode is None:
                terminal.type("\x03")  # one that comes just before readline waits is lost in it; a person presses again
                await asyncio.wait([asyncio.ensure_future(terminal.process.wait())], timeout=2.0)
        assert terminal.process.returncode == 0


class _Terminal:
    """A chat on a pseudo-terminal: what it printed, and a way to type."""

    def __init__(self, process: asyncio.subprocess.Process, descriptor: int) -> None:
        self.process = process
        self._descriptor = descriptor
        self._printed = ""
        self._changed = asyncio.Event()
        os.set_blocking(descriptor, False)
        asyncio.get_running_loop().add_reader(descriptor, self._read)

    @classmethod
    async def open(cls, running: RunningGateway) -> "_Terminal":
        ours, theirs = pty.openpty()
        command = (sys.executable, "-m", "tools.command", "chat", "--url", running.url, "--max-tokens", "12")
        process = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=_own_the_terminal
        )
        os.close(theirs)
        return cls(process, ours)

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    async def until(self, text: str) -> None:
        """Wait for a text, and forget everything up to its end."""
        async with asyncio.timeout(30):
            while text not in self._printed:
                self._changed.clear()
                await self._changed.wait()
        self._printed = self._printed.partition(text)[2]

    async def until_quiet_after(self, running: RunningGateway) -> None:
        """The answer has begun: its first text is here, and the request is open."""
        await self.until("hello\r\n")
        async with asyncio.timeout(30):
            while not (self._printed.strip() and running.mesh.open):
                self._changed.clear()
                await self._changed.wait()

    def _read(self) -> None:
        try:
            data = os.read(self._descriptor, 65536)
        except OSError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._descriptor)
        self._printed += data.decode("utf-8", "replace")
        self._changed.set()


def _own_the_terminal() -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
