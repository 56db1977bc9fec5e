"""`compose/watched.sh`, the main process of each container: it ends as its command does, and a command that no longer answers ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "compose" / "watched.sh"
QUICK = {"WATCH_EVERY_S": "0.1", "WATCH_TIMEOUT_S": "0.3", "WATCH_FAILURES": "2"}
SERVER = """
import os, pathlib, signal, socket, sys
folder = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (folder.joinpath("drained").touch(), os._exit(7)))
listener = socket.create_server(("127.0.0.1", 0))
folder.joinpath("pid.new").write_text(f"{os.getpid()} {listener.getsockname()[1]}\\n")
folder.joinpath("pid.new").rename(folder / "pid")
print("up", flush=True)
while True:
    connection, _ = listener.accept()
    folder.joinpath("asked").touch()
    connection.sendall(b"alive\\n")
    connection.close()
"""
CHECK = 'read -r pid port < {folder}/pid && exec bash -c "exec 3<>/dev/tcp/127.0.0.1/$port && head -n 1 <&3 | grep -q alive"'


@contextmanager
def watched(folder: Path, check: str, *command: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        ["sh", str(SCRIPT), check, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **QUICK},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@contextmanager
def watched_server(folder: Path) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """A server that has answered its watcher at least once."""
    with watched(folder, CHECK.format(folder=folder), sys.executable, "-c", SERVER, str(folder)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        while not (folder / "asked").exists():
            assert process.poll() is None
            time.sleep(0.02)
        yield process, int((folder / "pid").read_text().split()[0])


@pytest.mark.parametrize("status", [0, 3])
def test_it_ends_with_the_status_of_its_command(status: int, tmp_path: Path) -> None:
    with watched(tmp_path, "true", "sh", "-c", f"exit {status}") as process:
        assert process.wait(30) == status


def test_a_command_that_never_answered_is_left_to_start(tmp_path: Path) -> None:
    with watched(tmp_path, "false", "sh", "-c", "sleep 2; exit 5") as process:
        assert process.wait(30) == 5


def test_sigterm_reaches_the_command_which_may_drain(tmp_path: Path) -> None:
    with watched_server(tmp_path) as (process, _):
        process.terminate()
        assert process.wait(30) == 7
    assert (tmp_path / "drained").exists()


def test_a_frozen_command_is_killed_and_the_container_ends(tmp_path: Path) -> None:
    with watched_server(tmp_path) as (process, pid):
        os.kill(pid, signal.SIGSTOP)
        assert process.wait(30) == 128 + signal.SIGKILL
        assert not Path(f"/proc/{pid}").exists()
        assert process.stdout is not None
        assert "no answer 2 times" in process.stdout.read()
