"""What `segue serve` prints: one line a change of state, and at the end of the start what to paste."""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import TextIO

from common.runtime.supervisor_states import Report
from tools.serve_reachable import reachable_host

_PROGRESS_STEPS = 4
_WORDS = {
    "starting": "starting",
    "loading": "loading",
    "ready": "ready",
    "exited": "ended",
    "frozen": "FROZEN, killing it",
    "overdue": "did not end in time, killing it",
    "stopping": "stopping",
    "stopped": "stopped",
}


class TerminalView:
    """Told by the supervisor; writes for people. `processes_ready` is set once all of them are, the first time."""

    def __init__(self, output: TextIO) -> None:
        self._output = output
        self._shown: dict[str, tuple[str, str, int]] = {}
        self.processes_ready = asyncio.Event()
        self.on_stopping: Callable[[], None] | None = None

    def say(self, line: str) -> None:
        print(f"segue: {line}", file=self._output, flush=True)

    def report(self, report: Report, last_lines: Sequence[str]) -> None:
        step = int((report.progress or 0.0) * _PROGRESS_STEPS)
        shown = (report.what, report.detail, step)
        if self._shown.get(report.name) == shown:
            return
        self._shown[report.name] = shown
        part = "" if report.progress is None else f" {report.progress:.0%}"
        self._line(report.name, f"{_WORDS[report.what]}{part}{': ' + report.detail if report.detail else ''}")
        if report.detail.startswith("exit status") and report.detail != "exit status 0":
            for line in last_lines:
                self._line(report.name, f"| {line}")

    def warning(self, name: str, line: str) -> None:
        self._line(name, line)

    def all_ready(self) -> None:
        self.processes_ready.set()

    def stopping(self) -> None:
        self.say("stopping: running requests may end (Ctrl-C again stops at once)")
        if self.on_stopping is not None:
            self.on_stopping()

    def greet(self, address: tuple[str, int], *, model: str, needs_key: bool) -> None:
        host = reachable_host(address[0])
        url = f"http://{'[' + host + ']' if ':' in host else host}:{address[1]}"
        self.say(f"ready at {url}")
        for line in ("", curl_line(url, model=model, needs_key=needs_key), ""):
            print(line, file=self._output, flush=True)

    def _line(self, name: str, text: str) -> None:
        print(f"  {name:<10} {text}", file=self._output, flush=True)


def curl_line(url: str, *, model: str, needs_key: bool) -> str:
    """Ready to paste; the body is quoted for a shell."""
    body = {"model": model, "messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 64, "stream": True}
    quoted = json.dumps(body, ensure_ascii=False).replace("'", "'\\''")
    key = " -H 'authorization: Bearer YOUR-API-KEY'" if needs_key else ""
    return f"  curl -N {url}/v1/chat/completions -H 'content-type: application/json'{key} -d '{quoted}'"
