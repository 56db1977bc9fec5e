"""Connections to one Redis server, each spoken on by one operation at a time, in whole exchanges: commands out in one write, all
their answers in.

redis-py makes the connections, and so knows of passwords, TLS, sentinels and databases. Its commands and pipelines are not used:
a compare-and-set through them costs ten times the CPU of the two exchanges that it is.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

import hiredis
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection

Part = str | bytes | int
Command = tuple[Part, ...]
Reply = bytes | int | list["Reply"] | None
Result = TypeVar("Result")
READ_BYTES = 65536


class RedisLink:
    """One connection that is open. After an error its answers may be out of step: it is then closed, never used again."""

    def __init__(self, connection: AbstractConnection) -> None:
        self._connection = connection
        self._input = cast("asyncio.StreamReader", connection._reader)
        self._output = cast("asyncio.StreamWriter", connection._writer)
        self._replies = hiredis.Reader(protocolError=exceptions.InvalidResponse, replyError=connection._parser.parse_error)

    @property
    def is_usable(self) -> bool:
        return not self._input.at_eof() and self._input.exception() is None

    async def ask(self, *commands: Command) -> list[Reply]:
        """The answers in order. Raises the first error among them, redis-py's, once all have come."""
        self._output.write(b"".join([hiredis.pack_command(command) for command in commands]))  # type: ignore[arg-type]  # its stub has a tuple of one
        answers = [await self._answer() for _ in commands]
        for answer in answers:
            if isinstance(answer, list):
                _raise_first(answer)
        _raise_first(answers)
        return answers

    async def close(self) -> None:
        await self._connection.disconnect(nowait=True)

    async def _answer(self) -> Reply:
        while (answer := self._replies.gets()) is False:
            received = await self._input.read(READ_BYTES)
            if not received:
                raise exceptions.ConnectionError("the server closed the connection")
            self._replies.feed(received)
        return cast("Reply", answer)


class RedisLinks:
    """At most `limit` connections; further operations wait for one."""

    def __init__(self, client: Redis, *, limit: int) -> None:
        self._pool = client.connection_pool
        self._room = asyncio.Semaphore(limit)
        self._idle: list[RedisLink] = []

    async def run(self, operation: Callable[[RedisLink], Awaitable[Result]]) -> Result:
        """`operation` has a connection of its own. One that fails or is cancelled takes its connection along."""
        async with self._room:
            link = await self._take()
            try:
                result = await operation(link)
            except BaseException:
                await link.close()
                raise
            self._idle.append(link)
            return result

    async def close(self) -> None:
        idle, self._idle = self._idle, []
        for link in idle:
            await link.close()

    async def _take(self) -> RedisLink:
        while self._idle:
            link = self._idle.pop()
            if link.is_usable:
                return link
            await link.close()
        connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        await connection.connect()
        return RedisLink(connection)


def _raise_first(answers: list[Reply]) -> None:
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
