"""`segue serve` as its users run it, with the synthetic engine: it serves, survives deaths, and leaves nothing behind."""

import asyncio
import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tools.serve_reachable import until_ready

pytestmark = [pytest.mark.servers, pytest.mark.model, pytest.mark.timeout(240)]
ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 120.0
SYNTHETIC = ("--engine", "synthetic", "--kv-cache-memory", "64MiB")


class Served:
    """A running `segue serve`: its output, its address, its children."""

    def __init__(self, *flags: str, run_base: Path) -> None:
        command = [sys.executable, "-m", "tools.command", "serve", "--port", "0", *SYNTHETIC, *flags]
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(run_base)}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment, start_new_session=True
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def until(self, pattern: str, count: int = 1) -> re.Match[str]:
        """The `count`th line that matches; waits for it."""
        deadline = time.monotonic() + START_TIMEOUT_S
        with self._changed:
            while True:
                found = [match for line in self.lines if (match := re.search(pattern, line))]
                if len(found) >= count:
                    return found[count - 1]
                assert time.monotonic() < deadline, "\n".join(self.lines)
                assert self._reader.is_alive(), "\n".join(self.lines)
                self._changed.wait(1.0)

    @property
    def url(self) -> str:
        return self.until(r"ready at (http://\S+)")[1]

    def children(self) -> dict[str, int]:
        """Name → process id, from what is really there."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if int(path.read_text().rpartition(")")[2].split()[1]) == self.process.pid:
                    pid = int(path.parent.name)
                    found[_name(pid)] = pid
        return found

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip())
                self._changed.notify_all()


def _name(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return Path(words[-2]).stem if words[-2].endswith((".toml", ".conf")) else Path(words[0].split()[0]).stem.replace("-server", "")


@contextlib.contextmanager
def serving(run_base: Path, *flags: str) -> Iterator[Served]:
    served = Served(*flags, run_base=run_base)
    try:
        yield served
    finally:
        served.process.kill()
        served.process.wait()


def _ask(url: str, *, max_tokens: int = 4) -> str:
    body = {"model": "SmolLM2-135M-Instruct", "prompt": "one two three", "max_tokens": max_tokens, "ignore_eos": True}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=60.0)
    assert response.status_code == 200, response.text
    usage = response.json()["usage"]
    assert usage["completion_tokens"] == max_tokens
    return str(response.json()["choices"][0]["text"])


def _await_ready(url: str) -> None:
    address = httpx.URL(url)
    asyncio.run(asyncio.wait_for(until_ready(address.host, address.port or 80), START_TIMEOUT_S))


def _await_end(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        assert select.select([descriptor], [], [], 30)[0], "a child outlived serve"
        os.close(descriptor)


def test_it_serves_survives_deaths_and_ends_cleanly(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        url = served.url
        curl = served.until(r"curl -N (\S+) .* -d '(.*)'")
        assert json.loads(curl[2])["model"] == "SmolLM2-135M-Instruct"
        children = served.children()
        assert {"nats", "valkey", "prefill-0", "decode-0", "gateway"} == set(children)
        for pid in children.values():
            environment = Path(f"/proc/{pid}/environ").read_text() + Path(f"/proc/{pid}/cmdline").read_text()
            assert "segue:" not in environment, "no password in sight"
        text = _ask(url)
        os.kill(children["gateway"], signal.SIGKILL)
        assert httpx.get(f"{url}/health", timeout=60.0).status_code == 200, "the connection waited in the supervisor's socket"
        _await_ready(url)
        assert _ask(url) == text
        os.kill(children["decode-0"], signal.SIGKILL)
        served.until(r"decode-0 +ready", 2)
        _await_ready(url)
        assert _ask(url) == text
        descriptors = [os.pidfd_open(pid) for pid in served.children().values()]
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(60) == 0
        _await_end(descriptors)
    stopped = [line.split()[0] for line in served.lines if " stopped: " in line]
    assert stopped[0] == "gateway"
    assert set(stopped[-2:]) == {"nats", "valkey"}
    assert list((tmp_path / "segue" / "run").iterdir()) == []


def test_whatever_freezes_is_replaced_brokers_included(tmp_path: Path) -> None:
    with serving(tmp_path, "--freeze-s", "2") as served:
        url = served.url
        text = _ask(url)
        for name in ("nats", "valkey", "prefill-0", "decode-0", "gateway"):
            process = served.children()[name]
            ended = os.pidfd_open(process)
            os.kill(process, signal.SIGSTOP)
            served.until(rf"{name} +FROZEN")
            _await_end([ended])
            served.until(rf"{name} +ready", 2)
            _await_ready(url)
            assert _ask(url) == text
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(60) == 0


def test_nothing_runs_on_when_serve_is_killed_and_the_next_start_sweeps_up(tmp_path: Path) -> None:
    with serving(tmp_path, "--both", "2") as served:
        assert served.url
        children = served.children()
        assert {"both-0", "both-1"} <= set(children)
        assert not {"prefill-0", "decode-0"} & set(children)
        descriptors = [os.pidfd_open(pid) for pid in children.values()]
        served.process.kill()
        _await_end(descriptors)
    assert len(list((tmp_path / "segue" / "run").iterdir())) == 1
    with serving(tmp_path, "--both", "1") as again:
        assert _ask(again.url)
        assert len(list((tmp_path / "segue" / "run").iterdir())) == 1
        again.process.send_signal(signal.SIGTERM)
        again.process.send_signal(signal.SIGTERM)
        assert again.process.wait(60) == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["/nowhere/model"], ["/nowhere/model"]),
        (["--nats-url", "nats://127.0.0.1:1"], ["127.0.0.1:1"]),
        (["--redis-url", "redis://:hush@127.0.0.1:1"], ["127.0.0.1:1"]),
        (["--host", "0.0.0.0"], ["--insecure"]),
        (["--cores", "5000"], ["5000"]),
        (["--max-model-len", "1000000", "--engine", "torch"], ["--max-model-len"]),
        (["--kv-cache-memory", "900GiB", "--engine", "torch"], ["900", "GiB"]),
        (["--port", "99999"], ["65535"]),
        (["--no-such-flag"], ["--no-such-flag"]),
    ],
)
def test_bad_input_is_refused_at_once_with_status_two(flags: list[str], words: list[str], tmp_path: Path) -> None:
    status, said = _refused(flags, tmp_path)
    assert status == 2
    assert "Traceback" not in said
    assert "hush" not in said
    for word in words:
        assert word in said
    assert not list(tmp_path.glob("segue/run/*"))


def test_a_taken_port_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        status, said = _refused(["--port", port], tmp_path)
    assert status == 2
    assert port in said


def _refused(flags: list[str], run_base: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "tools.command", "serve", "--port", "0", "--engine", "synthetic", *flags]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(run_base)}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60, check=False)
    return ended.returncode, ended.stdout + ended.stderr
