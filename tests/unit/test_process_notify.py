"""The child's end of the notify pipe: nothing without a supervisor, whole lines, and never a block or an error."""

import asyncio
import contextlib
import fcntl
import os

from hypothesis import given
from hypothesis import strategies as st

from common.runtime.process_notify import ProcessNotifier
from common.runtime.supervisor_watch import read_notification


def test_without_the_variable_or_with_a_closed_descriptor_nothing_happens() -> None:
    for environ in ({}, {"SEGUE_NOTIFY_FD": "x"}, {"SEGUE_NOTIFY_FD": "987654"}):
        notifier = ProcessNotifier.from_environment(environ)
        notifier.state("ready")
        asyncio.run(notifier.heartbeat())


def test_states_arrive_as_events() -> None:
    reading, writing = os.pipe()
    notifier = ProcessNotifier(writing)
    notifier.state("loading", detail="weights", progress=0.25)
    notifier.state("ready")
    notifier.close()
    with open(reading, encoding="utf-8") as lines:
        events = [read_notification("a", 1, line) for line in lines]
    assert [(event.state, event.detail, event.progress) for event in events if event] == [
        ("loading", "weights", 0.25),
        ("ready", "", None),
    ]


def test_a_full_pipe_keeps_the_last_state_for_the_next_beat() -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, 1031, 4096)
    notifier = ProcessNotifier(writing)
    for count in range(200):
        notifier.state("loading", detail="x" * 100, progress=count / 200)
    notifier.state("ready", detail="y" * 400)
    assert b"ready" not in os.read(reading, 1 << 20)

    async def one_beat() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(notifier.heartbeat(), 0.05)

    asyncio.run(one_beat())
    notifier.close()
    with open(reading, encoding="utf-8") as lines:
        assert '"ready"' in lines.readline()


def test_a_process_that_is_dead_in_its_own_eyes_withholds_its_heartbeat() -> None:
    reading, writing = os.pipe()
    notifier = ProcessNotifier(writing)

    async def beat_a_while() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(notifier.heartbeat(lambda: False), 0.05)

    asyncio.run(beat_a_while())
    notifier.state("draining")
    notifier.close()
    with open(reading, encoding="utf-8") as lines:
        assert "draining" in lines.readline()


def test_a_supervisor_that_is_gone_is_no_error() -> None:
    reading, writing = os.pipe()
    notifier = ProcessNotifier(writing)
    os.close(reading)
    notifier.state("ready")
    notifier.state("draining")


@given(st.text())
def test_any_line_is_read_without_an_error(line: str) -> None:
    event = read_notification("a", 1, line)
    assert event is None or event.name == "a"
