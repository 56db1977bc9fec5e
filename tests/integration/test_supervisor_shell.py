"""The supervisor on real processes: deaths, freezes, order of stopping, and nothing left when it is killed itself."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from common.runtime.supervisor_brokers import own_nats, own_valkey
from common.runtime.supervisor_process import ProcessSpec
from common.runtime.supervisor_shell import SupervisorShell
from common.runtime.supervisor_states import ChildSpec, Report

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import asyncio, os, signal, sys
from common.runtime.process_notify import ProcessNotifier
async def main():
    notifier = ProcessNotifier.from_environment()
    notifier.state("loading", detail="weights", progress=0.5)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    beat = asyncio.create_task(notifier.heartbeat())
    print("2025-01-01T00:00:00Z warning child something_odd", flush=True)
    notifier.state("ready")
    await stop.wait()
    notifier.state("draining")
    beat.cancel()
async def deaf():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    notifier = ProcessNotifier.from_environment()
    notifier.state("ready")
    await notifier.heartbeat()
if sys.argv[1] == "refuse":
    print("bad settings"); sys.exit(2)
if sys.argv[1] == "parent":
    import subprocess
    subprocess.Popen(["sleep", "1000"])
asyncio.run(deaf() if sys.argv[1] == "deaf" else main())
"""


class View:
    """Collects what it is told; a test awaits a condition on it."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.last_lines: list[str] = []
        self.warnings: list[tuple[str, str]] = []
        self.is_ready = False
        self.changed = asyncio.Condition()
        self._notify: list[asyncio.Task[None]] = []

    def report(self, report: Report, last_lines: Sequence[str]) -> None:
        self.reports.append(report)
        self.last_lines += last_lines
        self._wake()

    def warning(self, name: str, line: str) -> None:
        self.warnings.append((name, line))
        self._wake()

    def all_ready(self) -> None:
        self.is_ready = True
        self._wake()

    def stopping(self) -> None:
        self._wake()

    def count(self, name: str, what: str) -> int:
        return sum(report.name == name and report.what == what for report in self.reports)

    async def until(self, name: str, what: str, count: int = 1) -> None:
        async with asyncio.timeout(60), self.changed:
            await self.changed.wait_for(lambda: self.count(name, what) >= count)

    async def until_ready(self) -> None:
        async with asyncio.timeout(60), self.changed:
            await self.changed.wait_for(lambda: self.is_ready)

    def _wake(self) -> None:
        async def wake() -> None:
            async with self.changed:
                self.changed.notify_all()

        self._notify.append(asyncio.create_task(wake()))


def _spec(
    name: str, kind: str = "normal", *, stop_stage: int = 1, drain_s: float = 20.0, cores: tuple[int, ...] | None = None
) -> ProcessSpec:
    child = ChildSpec(name=name, start_stage=0, stop_stage=stop_stage, drain_s=drain_s, freeze_s=4.0)
    command = (sys.executable, "-c", CHILD, kind)
    return ProcessSpec(child=child, command=command, environment=dict(os.environ), folder=str(ROOT), cores=cores)


@asynccontextmanager
async def supervised(tmp_path: Path, *specs: ProcessSpec) -> AsyncIterator[tuple[SupervisorShell, View, asyncio.Task[int]]]:
    view = View()
    shell = SupervisorShell(specs, logs=tmp_path, view=view)
    running = asyncio.create_task(shell.run())
    try:
        yield shell, view, running
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


def _command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _saved_files(folder: Path) -> list[Path]:
    return [*folder.glob("*.rdb"), *folder.glob("*.aof")]


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


async def test_a_killed_and_a_frozen_child_come_back_and_a_stop_drains_in_order(tmp_path: Path) -> None:
    async with supervised(tmp_path, _spec("worker", "parent"), _spec("gateway", stop_stage=2)) as (shell, view, running):
        await view.until_ready()
        assert ("worker", "2025-01-01T00:00:00Z warning child something_odd") in view.warnings
        os.kill(shell.process_ids["worker"], signal.SIGKILL)
        await view.until("worker", "ready", 2)
        frozen = shell.process_ids["worker"]
        os.kill(frozen, signal.SIGSTOP)
        await view.until("worker", "frozen")
        await view.until("worker", "ready", 3)
        assert not _is_alive(frozen)
        assert view.count("gateway", "starting") == 1
        shell.stop()
        assert await running == 0
        stopped = [report for report in view.reports if report.what in ("stopping", "stopped")]
        assert [(report.name, report.what) for report in stopped] == [
            ("gateway", "stopping"),
            ("gateway", "stopped"),
            ("worker", "stopping"),
            ("worker", "stopped"),
        ]
        assert all("exit status 0" in report.detail for report in stopped if report.what == "stopped")
        assert "something_odd" in (tmp_path / "worker.log").read_text()


async def test_a_deaf_child_is_killed_at_its_deadline_or_at_the_second_stop(tmp_path: Path) -> None:
    for patient in (True, False):
        async with supervised(tmp_path, _spec("deaf", "deaf", drain_s=0.5 if patient else 100.0)) as (shell, view, running):
            await view.until_ready()
            shell.stop()
            if not patient:
                shell.stop()
            async with asyncio.timeout(30):
                assert await running == 0
            assert view.count("deaf", "overdue") == patient


async def test_refused_settings_end_with_status_two_and_last_lines(tmp_path: Path) -> None:
    async with supervised(tmp_path, _spec("worker"), _spec("bad", "refuse")) as (_, view, running):
        async with asyncio.timeout(60):
            assert await running == 2
        assert "bad settings" in view.last_lines


async def test_a_missing_program_is_reported_and_given_up(tmp_path: Path) -> None:
    spec = ProcessSpec(
        child=ChildSpec(name="ghost", start_stage=0, stop_stage=0), command=("/nowhere/ghost",), environment={}, folder="/"
    )
    async with supervised(tmp_path, spec) as (_, view, running):
        async with asyncio.timeout(60):
            assert await running == 1
        assert view.reports[-1].what == "stopped" or view.count("ghost", "exited") >= 4


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
async def test_a_child_runs_on_its_cores(tmp_path: Path) -> None:
    core = max(os.sched_getaffinity(0))
    async with supervised(tmp_path, _spec("worker", cores=(core,))) as (shell, view, _):
        await view.until_ready()
        assert os.sched_getaffinity(shell.process_ids["worker"]) == {core}


@pytest.mark.servers
async def test_own_brokers_are_private_and_come_back_on_their_port_when_killed_or_frozen(tmp_path: Path) -> None:
    nats, valkey = own_nats(tmp_path, os.environ, freeze_s=4.0), own_valkey(tmp_path, os.environ, freeze_s=4.0)
    with nats.port_holder, valkey.port_holder:
        async with supervised(tmp_path, nats.process, valkey.process) as (shell, view, running):
            await view.until_ready()
            for pid in shell.process_ids.values():
                assert b"segue:" not in _command_line(pid)
            os.kill(shell.process_ids["nats"], signal.SIGKILL)
            os.kill(shell.process_ids["valkey"], signal.SIGSTOP)
            await view.until("nats", "ready", 2)
            await view.until("valkey", "ready", 2)
            shell.stop()
            assert await running == 0
    assert _saved_files(tmp_path) == []


def test_nothing_stays_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    program = textwrap.dedent(f"""
        import asyncio, os, sys
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from tests.integration.test_supervisor_shell import View, _spec
        from common.runtime.supervisor_shell import SupervisorShell
        async def main():
            view = View()
            shell = SupervisorShell([_spec("one"), _spec("two", "deaf")], logs=Path({str(tmp_path)!r}), view=view)
            running = asyncio.create_task(shell.run())
            await view.until_ready()
            print(*shell.process_ids.values(), flush=True)
            await running
        asyncio.run(main())
    """)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT) as supervisor:
        assert supervisor.stdout is not None
        children = [int(word) for word in supervisor.stdout.readline().split()]
        assert len(children) == 2
        descriptors = [os.pidfd_open(pid) for pid in children]
        supervisor.kill()
        supervisor.wait()
        for descriptor in descriptors:
            _await_end(descriptor)
    assert not any(map(_is_alive, children))


def _await_end(descriptor: int) -> None:
    import select

    assert select.select([descriptor], [], [], 30)[0], "a child outlived its supervisor"
    os.close(descriptor)
