"""The state store port on Redis (6.2 and later) or Valkey.

Compare-and-set is WATCH, read, MULTI, EXEC: no scripting, which managed Redis services may forbid. Nothing is retried
after its command may have reached the server: where an answer is lost the caller gets StoreUnavailable and must read the
record to learn what happened. Only an EXEC that the server itself refused (somebody else wrote the record) goes again.

redis-py puts the arguments of a failed command into its error texts; ours are prompts. Errors are therefore told by
their kind alone, and not chained.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar, cast

from redis import exceptions
from redis.asyncio.sentinel import MasterNotFoundError

from common.adapters.redis_links import Command, Part, RedisLink, RedisLinks, Reply
from common.adapters.redis_targets import MAX_CONNECTIONS, redis_targets
from common.adapters.server_urls import redacted_list
from common.values.errors import InvariantBroken, StoreUnavailable
from common.values.server_access import SYSTEM_TLS, TlsFiles

Result = TypeVar("Result")
SCAN_COUNT = 1000


class RedisStore:
    """One pool of connections to the server that is primary now. Make it with `connect`; end it with `close`."""

    def __init__(self, urls: Sequence[str], *, timeout_s: float, tls: TlsFiles) -> None:
        targets = redis_targets(urls, timeout_s=timeout_s, tls=tls)
        self._shown = [target.shown for target in targets]
        self._clients = [target.client for target in targets]
        self._links = [RedisLinks(client, limit=MAX_CONNECTIONS) for client in self._clients]
        self._timeout_s = timeout_s
        self._active = 0
        self._is_checked = False
        self._counts: Counter[str] = Counter(operations=0, errors=0, conflicts=0)

    @classmethod
    async def connect(cls, urls: Sequence[str], *, timeout_s: float = 2.0, tls: TlsFiles = SYSTEM_TLS) -> "RedisStore":
        """Connect to the first of these servers (one primary and its replicas) that is primary and answers.

        `redis_targets` says what URLs there are. Raises StoreUnavailable where none answers, SettingsError where an URL is none
        or a file cannot be used.
        """
        store = cls(urls, timeout_s=timeout_s, tls=tls)
        reasons = []
        for _ in store._clients:
            try:
                await store._run(_ping)
                return store
            except StoreUnavailable as error:
                reasons.append(str(error))
        await store.close()
        hint = "start valkey-server or redis-server there, or correct the URL"
        raise StoreUnavailable(f"cannot use Redis at {redacted_list(urls)} ({'; '.join(reasons)}): {hint}")

    def counts(self) -> Mapping[str, int]:
        """For metrics: operations, those that failed, compare-and-sets that were tried again."""
        return dict(self._counts)

    async def create(self, key: str, fields: Mapping[str, bytes], *, ttl_s: float) -> bool:
        _check_fields(key, fields)

        async def attempt(link: RedisLink) -> bool | None:
            _, known = await link.ask(("WATCH", key), ("EXISTS", key))
            return await (_give_up(link) if known else _write(link, key, fields, ttl_s))

        return await self._watched(attempt)

    async def put(self, key: str, fields: Mapping[str, bytes], *, ttl_s: float) -> None:
        _check_fields(key, fields)
        await self._run(lambda link: _write(link, key, fields, ttl_s))

    async def update_if(self, key: str, *, expected: Mapping[str, bytes], changes: Mapping[str, bytes], ttl_s: float) -> bool:
        look: list[Command] = [("WATCH", key), ("EXISTS", key)]
        if expected:
            look.append(("HMGET", key, *expected))

        async def attempt(link: RedisLink) -> bool | None:
            _, known, *values = await link.ask(*look)
            is_expected = bool(known) and (not expected or values == [list(expected.values())])
            return await (_write(link, key, changes, ttl_s) if is_expected else _give_up(link))

        return await self._watched(attempt)

    async def read(self, key: str) -> dict[str, bytes] | None:
        found = cast("list[bytes]", await self._ask("HGETALL", key))
        return {name.decode(): value for name, value in zip(found[::2], found[1::2], strict=True)} or None

    async def refresh(self, key: str, *, ttl_s: float) -> bool:
        return bool(await self._ask("PEXPIRE", key, _milliseconds(ttl_s)))

    async def delete(self, key: str) -> None:
        await self._ask("DEL", key)

    async def keys(self, prefix: str) -> list[str]:
        """The time-out bounds each page of the scan, not the whole."""
        pattern = _glob_escaped(prefix) + "*"
        found: set[str] = set()  # a key may come twice
        cursor = b"0"
        while True:
            cursor, page = cast("tuple[bytes, list[bytes]]", await self._ask("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_COUNT))
            found.update(key.decode() for key in page)
            if cursor == b"0":
                return list(found)

    async def append(self, lists: Mapping[str, Sequence[bytes]], *, ttl_s: float) -> dict[str, int]:
        """One round trip for all."""
        commands: list[Command] = []
        for key, entries in lists.items():
            _check_entries(key, entries)
            commands += [("RPUSH", key, *entries), ("PEXPIRE", key, _milliseconds(ttl_s))]
        if not commands:
            return {}
        answers = cast("list[int]", await self._run(lambda link: link.ask(*commands)))
        return dict(zip(lists, answers[::2], strict=True))

    async def read_list(self, key: str) -> list[bytes]:
        return cast("list[bytes]", await self._ask("LRANGE", key, 0, -1))

    async def ping(self, *, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._run(_ping)
        except (StoreUnavailable, TimeoutError):
            return False
        return True

    async def close(self) -> None:
        for links, client in zip(self._links, self._clients, strict=True):
            await links.close()
            await client.aclose()

    async def _ask(self, *command: Part) -> Reply:
        (answer,) = await self._run(lambda link: link.ask(command))
        return answer

    async def _run(self, operation: Callable[[RedisLink], Awaitable[Result]]) -> Result:
        """One operation, bounded in time. A failure turns to the next server, where there are several."""
        index = self._active
        links = self._links[index]
        self._counts["operations"] += 1
        try:
            async with asyncio.timeout(self._timeout_s):
                if len(self._clients) > 1 and not self._is_checked:
                    await links.run(_check_is_primary)
                    self._is_checked = True
                return await links.run(operation)
        except (exceptions.RedisError, OSError) as error:
            reason = self._explain(error)
        self._counts["errors"] += 1
        if index == self._active:
            self._active = (index + 1) % len(self._clients)
            self._is_checked = False
        raise StoreUnavailable(f"Redis at {self._shown[index]}: {reason}")

    async def _watched(self, attempt: Callable[[RedisLink], Awaitable[bool | None]]) -> bool:
        """Try until nobody else writes the key between the look and the write; the time-out around it is the bound."""

        async def operation(link: RedisLink) -> bool:
            while (done := await attempt(link)) is None:
                self._counts["conflicts"] += 1
            return done

        return await self._run(operation)

    def _explain(self, error: Exception) -> str:
        match error:
            case (
                exceptions.AuthenticationError() | exceptions.AuthorizationError() | exceptions.AuthenticationWrongNumberOfArgsError()
            ):
                return "it asks for a password, or refuses this one; write user:password@ into the URL"
            case exceptions.NoPermissionError():
                return "its access rules refuse this command to this user"
            case exceptions.OutOfMemoryError():
                return "it is full (maxmemory is reached) and takes no writes"
            case exceptions.ReadOnlyError():
                return "it is a read-only replica; name the primary"
            case exceptions.BusyLoadingError():
                return "it is still loading its data"
            case exceptions.TimeoutError() | TimeoutError():
                return f"no answer within {self._timeout_s:g} s"
            case MasterNotFoundError():
                return "the sentinels know no primary of that name, or none answers"
            case exceptions.ConnectionError() | OSError():
                return str(error) or "the connection was lost"
            case _:
                return f"it refused the command ({_error_code(error)})"


async def _ping(link: RedisLink) -> None:
    await link.ask(("PING",))


async def _check_is_primary(link: RedisLink) -> None:
    (role,) = await link.ask(("ROLE",))
    if not isinstance(role, list) or role[0] != b"master":
        raise exceptions.ReadOnlyError


async def _write(link: RedisLink, key: str, fields: Mapping[str, bytes], ttl_s: float) -> bool | None:
    """None where somebody else has written what was watched: nothing was done."""
    commands: list[Command] = [("MULTI",), ("PEXPIRE", key, _milliseconds(ttl_s)), ("EXEC",)]
    if fields:
        commands.insert(1, ("HSET", key, *(part for pair in fields.items() for part in pair)))
    answers = await link.ask(*commands)
    return None if answers[-1] is None else True


async def _give_up(link: RedisLink) -> bool:
    await link.ask(("UNWATCH",))
    return False


def _check_fields(key: str, fields: Mapping[str, bytes]) -> None:
    if not fields:
        raise InvariantBroken(f"a record needs at least one field: {key}")


def _check_entries(key: str, entries: Sequence[bytes]) -> None:
    if not entries:
        raise InvariantBroken(f"a list grows by at least one entry: {key}")


def _milliseconds(ttl_s: float) -> int:
    return max(1, round(ttl_s * 1000))


def _glob_escaped(text: str) -> str:
    return "".join(f"\\{character}" if character in "*?[]\\" else character for character in text)


def _error_code(error: Exception) -> str:
    """`WRONGTYPE`, `MISCONF`, …: the first word of what the server said, without what redis-py writes around it."""
    words = str(error).rpartition("caused error: ")[2].split(maxsplit=1)
    return words[0] if words and words[0].isupper() else type(error).__name__
