"""How a child process tells the supervisor that it lives, and dies when the supervisor does.

The child writes JSON lines to the pipe whose number is in SEGUE_NOTIFY_FD: `{"state":"loading","detail":"…","progress":0.4}`
on a change, `{}` as a heartbeat each second. The heartbeat comes from the event loop: a process whose loop hangs is as good
as dead, and is restarted like a dead one. So is one that withholds its heartbeat, because something else in it hangs.
Started by hand, without the variable, all of this does nothing.
"""

import asyncio
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Literal

from common.policy.watchdog import BEAT_EVERY_S

NOTIFY_VARIABLE = "SEGUE_NOTIFY_FD"
HEARTBEAT_S = BEAT_EVERY_S
MAX_DETAIL_CHARACTERS = 500
ProcessState = Literal["loading", "ready", "draining"]
_PR_SET_PDEATHSIG = 1


class ProcessNotifier:
    """The child's end of the pipe. Never blocks and never fails: a supervisor that does not read loses lines, not the child.

    A state that did not fit into the pipe is sent again with the next heartbeat.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self._unsent: bytes | None = None
        if descriptor is not None:
            os.set_inheritable(descriptor, False)
            os.set_blocking(descriptor, False)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> "ProcessNotifier":
        text = (os.environ if environ is None else environ).get(NOTIFY_VARIABLE, "")
        return cls(int(text) if text.isdigit() and _is_open(int(text)) else None)

    def state(self, state: ProcessState, *, detail: str = "", progress: float | None = None) -> None:
        """Say where the process is. `progress` is the part of the loading that is done, 0 to 1."""
        line = {"state": state, "detail": detail[:MAX_DETAIL_CHARACTERS]} | (
            {} if progress is None else {"progress": round(progress, 4)}
        )
        encoded = json.dumps(line).encode() + b"\n"
        self._unsent = None if self._send(encoded) else encoded

    async def heartbeat(self, alive: Callable[[], bool] = lambda: True) -> None:
        """Beat until cancelled, as long as the process is `alive` in its own eyes. Put it into the service's task group."""
        while self._descriptor is not None:
            if self._unsent is not None and self._send(self._unsent):
                self._unsent = None
            if alive():
                self._send(b"{}\n")
            await asyncio.sleep(HEARTBEAT_S)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _send(self, line: bytes) -> bool:
        """A line is shorter than PIPE_BUF, so it goes whole or not at all. False: try again later."""
        if self._descriptor is None:
            return True
        try:
            os.write(self._descriptor, line)
        except BlockingIOError:
            return False
        except OSError:
            self.close()
        return True


def die_with_parent(expected_parent: int | None = None) -> None:
    """Have the kernel kill this process (SIGKILL) when the thread that started it ends. Linux; elsewhere nothing happens.

    A parent that ended before this call is noticed by its id, where the caller knows it.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if expected_parent is not None and os.getppid() != expected_parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
