"""Runs the supervisor machine on real processes: performs its effects, brings it what happened.

Everything the machine decides is done at once and in order on the event loop's thread; tasks only listen (one per running
process) and all live in one task group.
"""

import asyncio
import contextlib
import os
import signal
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, assert_never

from common.runtime.supervisor import Supervisor
from common.runtime.supervisor_log import ChildLog
from common.runtime.supervisor_process import ProcessSpec, RunningProcess, spawn
from common.runtime.supervisor_states import (
    AllReady,
    Begin,
    Exited,
    Finished,
    Notified,
    Report,
    Signal,
    Spawn,
    StopAsked,
    Stopping,
    SupervisorEffect,
    SupervisorEvent,
    TimerFired,
)
from common.runtime.supervisor_watch import lines_of, read_notification, watch_server

LAST_WORDS_S = 1.0


class SupervisorView(Protocol):
    """Who is told. Called on the event loop; must not block or raise."""

    def report(self, report: Report, last_lines: Sequence[str]) -> None:
        """`last_lines` is the end of the log of a process that ended unasked."""
        ...

    def warning(self, name: str, line: str) -> None: ...
    def all_ready(self) -> None: ...
    def stopping(self) -> None: ...


class SupervisorShell:
    """`run` starts all and returns the exit status once all have ended. SIGINT, SIGTERM and SIGHUP ask it to stop."""

    def __init__(self, specs: Sequence[ProcessSpec], *, logs: Path, view: SupervisorView) -> None:
        self._specs: Mapping[str, ProcessSpec] = {spec.child.name: spec for spec in specs}
        self._machine = Supervisor(spec.child for spec in specs)
        self._logs = {name: ChildLog(logs / f"{name}.log") for name in self._specs}
        self._view = view
        self._running: dict[str, RunningProcess] = {}
        self._events: deque[SupervisorEvent] = deque()
        self._handling = False
        self._woken = asyncio.Event()
        self._code = 0
        self._group = asyncio.TaskGroup()

    @property
    def process_ids(self) -> dict[str, int]:
        return {name: running.pid for name, running in self._running.items()}

    def stop(self) -> None:
        """Drain and end; called again: end at once."""
        self._post(StopAsked())

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for number in signals:
            loop.add_signal_handler(number, self.stop)
        try:
            async with self._group:
                self._post(Begin())
                await self._tick()
        finally:
            for number in signals:
                loop.remove_signal_handler(number)
            for running in self._running.values():
                running.kill()
            for log in self._logs.values():
                log.close()
        return self._code

    async def _tick(self) -> None:
        """Wake the machine at its timers until it has finished."""
        while (due := self._machine.get_timer()) is not None:
            self._woken.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._woken.wait()
            if not self._woken.is_set():
                self._post(TimerFired())

    def _post(self, event: SupervisorEvent) -> None:
        """Hand an event to the machine and do what it says. What comes up meanwhile waits its turn."""
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events:
                for effect in self._machine.handle(self._events.popleft(), asyncio.get_running_loop().time()):
                    self._perform(effect)
        finally:
            self._handling = False
        self._woken.set()

    def _perform(self, effect: SupervisorEffect) -> None:
        match effect:
            case Spawn(name=name, start=start):
                self._spawn(name, start)
            case Signal(name=name, force=force):
                if (running := self._running.get(name)) is not None:
                    if force:
                        running.kill()
                    else:
                        running.terminate()
            case Report(name=name, what=what):
                self._logs[name].note(f"supervisor: {what} {effect.detail}".rstrip())
                self._view.report(effect, self._logs[name].tail() if what == "exited" else ())
            case AllReady():
                self._view.all_ready()
            case Stopping():
                self._view.stopping()
            case Finished(code=code):
                self._code = code
            case _:
                assert_never(effect)

    def _spawn(self, name: str, start: int) -> None:
        try:
            running = spawn(self._specs[name])
        except OSError as error:
            self._logs[name].note(f"supervisor: {error}")
            self._events.append(Exited(name=name, start=start, code=None))
            return
        self._running[name] = running
        self._group.create_task(self._attend(name, start, running), name=f"attend {name}")

    async def _attend(self, name: str, start: int, running: RunningProcess) -> None:
        """Listen to a process until it has ended and its last words are read."""
        async with asyncio.TaskGroup() as listeners:
            log = listeners.create_task(self._read_log(name, running.log))
            notes = listeners.create_task(self._hear(name, start, running.notify))
            code = await running.wait()
            await asyncio.wait([log], timeout=LAST_WORDS_S)
            log.cancel()
            notes.cancel()
        del self._running[name]
        self._post(Exited(name=name, start=start, code=code))

    async def _read_log(self, name: str, descriptor: int) -> None:
        shows = self._specs[name].shows_warnings
        async for line in lines_of(descriptor):
            is_warning = self._logs[name].write(line)
            if is_warning and shows:
                self._view.warning(name, line)

    async def _hear(self, name: str, start: int, descriptor: int) -> None:
        probe = self._specs[name].probe
        if probe is None:
            async for line in lines_of(descriptor):
                if (event := read_notification(name, start, line)) is not None:
                    self._post(event)
            return
        os.close(descriptor)
        await watch_server(probe, lambda: self._post(Notified(name=name, start=start, state="ready")))
