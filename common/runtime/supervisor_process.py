"""One supervised process: spawned, listened to, waited for. Linux has pidfds; elsewhere a thread waits.

Each child is a session and process group of its own, so Ctrl-C reaches the supervisor alone; its standard input is empty; the
kernel kills it when the supervisor dies. PR_SET_PDEATHSIG is tied to the thread that forks, so `spawn` must be called in the
main thread, which lives as long as the process.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from common.runtime.process_notify import NOTIFY_VARIABLE, die_with_parent
from common.runtime.supervisor_states import ChildSpec
from common.values.errors import InvariantBroken

_PIPE_BYTES = 1 << 20
_F_SETPIPE_SZ = 1031


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerProbe:
    """How to ask a server that speaks no notify protocol whether it lives: send `ping`, await a line that begins with `pong`."""

    port: int
    hello: bytes
    ping: bytes
    pong: bytes
    answers: Mapping[bytes, bytes] = field(default_factory=dict)
    """What the server asks on its own, and what to say then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """`probe` is None for a process that speaks the notify protocol. `cores` None leaves the affinity as it is."""

    child: ChildSpec
    command: Sequence[str]
    environment: Mapping[str, str]
    folder: str
    descriptors: tuple[int, ...] = ()
    cores: tuple[int, ...] | None = None
    probe: ServerProbe | None = None
    shows_warnings: bool = True


@dataclass(slots=True, kw_only=True)
class RunningProcess:
    """`log` and `notify` are the reading ends of the child's output and notify pipe; whoever reads them closes them."""

    process: subprocess.Popen[bytes]
    log: int
    notify: int

    @property
    def pid(self) -> int:
        return self.process.pid

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """The whole group, so that a compiler it started goes too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    async def wait(self) -> int:
        """Its exit code, once it has ended. What is left of its group is killed before its id is free for others."""
        await _ended(self.process)
        self.kill()
        return self.process.wait()


def spawn(spec: ProcessSpec) -> RunningProcess:
    """Start it. Raises OSError where the program cannot be run."""
    if threading.current_thread() is not threading.main_thread():
        raise InvariantBroken("children are spawned in the main thread alone: their lives hang on the thread that forks")
    log_read, log_write = os.pipe2(os.O_CLOEXEC)
    notify_read, notify_write = os.pipe2(os.O_CLOEXEC)
    with contextlib.suppress(OSError, AttributeError):
        _enlarge(log_read)
    try:
        process = subprocess.Popen(
            list(spec.command),
            stdin=subprocess.DEVNULL,
            stdout=log_write,
            stderr=log_write,
            cwd=spec.folder,
            env={**spec.environment, NOTIFY_VARIABLE: str(notify_write)},
            pass_fds=(*spec.descriptors, notify_write),
            start_new_session=True,
            preexec_fn=_before_exec(spec.cores, os.getpid()),
        )
    except BaseException:
        os.close(log_read)
        os.close(notify_read)
        raise
    finally:
        os.close(log_write)
        os.close(notify_write)
    return RunningProcess(process=process, log=log_read, notify=notify_read)


def _before_exec(cores: tuple[int, ...] | None, parent: int) -> Callable[[], None]:
    def prepare() -> None:
        die_with_parent(parent)
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)

    return prepare


def _enlarge(descriptor: int) -> None:
    """A supervisor that is slow for a moment must not hold up the one who logs."""
    import fcntl

    fcntl.fcntl(descriptor, _F_SETPIPE_SZ, _PIPE_BYTES)


async def _ended(process: subprocess.Popen[bytes]) -> None:
    loop = asyncio.get_running_loop()
    try:
        descriptor = os.pidfd_open(process.pid)
    except (AttributeError, OSError):
        await loop.run_in_executor(None, lambda: os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT))
        return
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
