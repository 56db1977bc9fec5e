"""What the supervisor hears of its children: output lines, notify lines, answers of servers to a ping."""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable

from common.policy.watchdog import BEAT_EVERY_S
from common.runtime.supervisor_process import ServerProbe
from common.runtime.supervisor_states import Notified

PING_EVERY_S = BEAT_EVERY_S
PING_TIMEOUT_S = 2.0
CONNECT_AGAIN_S = 0.05
MAX_LINE_BYTES = 64 * 1024


async def lines_of(descriptor: int) -> AsyncIterator[str]:
    """The lines that come out of a pipe, until all writers have closed it. Owns and closes the descriptor.

    Longer lines than MAX_LINE_BYTES are cut into several.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=MAX_LINE_BYTES, loop=loop)
    pipe = os.fdopen(descriptor, "rb", 0)
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader, loop=loop), pipe)
    pending = b""
    try:
        while data := await reader.read(MAX_LINE_BYTES):
            *whole, pending = (pending + data).split(b"\n")
            for line in whole:
                yield line.decode("utf-8", "replace")
            if len(pending) >= MAX_LINE_BYTES:
                yield pending.decode("utf-8", "replace")
                pending = b""
        if pending:
            yield pending.decode("utf-8", "replace")
    finally:
        transport.close()


def read_notification(name: str, start: int, line: str) -> Notified | None:
    """A line of the notify protocol as an event; None for what is no such line (a child may be of another version)."""
    try:
        content = json.loads(line)
    except ValueError:
        return None
    if not isinstance(content, dict):
        return None
    state, detail, progress = content.get("state"), content.get("detail"), content.get("progress")
    return Notified(
        name=name,
        start=start,
        state=state if state in ("loading", "ready", "draining") else None,
        detail=detail if isinstance(detail, str) else "",
        progress=float(progress) if isinstance(progress, int | float) and not isinstance(progress, bool) else None,
    )


async def watch_server(probe: ServerProbe, on_alive: Callable[[], None]) -> None:
    """Ping a server on loopback again and again until cancelled; `on_alive` after each answer. Silence says the rest."""
    while True:
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
            await _ping_while_it_answers(probe, on_alive)
        await asyncio.sleep(CONNECT_AGAIN_S)


async def _ping_while_it_answers(probe: ServerProbe, on_alive: Callable[[], None]) -> None:
    async with asyncio.timeout(PING_TIMEOUT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", probe.port)
    try:
        writer.write(probe.hello)
        while True:
            async with asyncio.timeout(PING_TIMEOUT_S):
                await _ping_once(probe, reader, writer)
            on_alive()
            await asyncio.sleep(PING_EVERY_S)
    finally:
        writer.close()


async def _ping_once(probe: ServerProbe, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(probe.ping)
    await writer.drain()
    while not (line := await reader.readuntil(b"\n")).startswith(probe.pong):
        if line.startswith(b"-"):
            raise ConnectionError(line.decode("utf-8", "replace"))
        if answer := probe.answers.get(line.strip()):
            writer.write(answer)
