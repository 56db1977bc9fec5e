"""From Redis URLs to clients: servers named one by one, or sentinels that know which one is primary now.

`redis://`, `rediss://` (TLS) or `unix://` name a server, with `user:password@` and `/database` where needed; several are one
primary and its replicas. `sentinel://host:26379/NAME` (`sentinels://`: TLS, to sentinels and servers alike) names a sentinel and
the primary to ask it for; `user:password@` is then the servers', and `?database=1` the database. All sentinels make one target.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict
from urllib.parse import SplitResult, parse_qs, unquote

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from common.adapters.server_urls import parse_server_url, redacted, redacted_list, take_credentials
from common.adapters.tls_context import client_context
from common.values.errors import SettingsError
from common.values.server_access import TlsFiles

MAX_CONNECTIONS = 64
"""At once; further operations wait for one, within their time-out."""
SENTINEL_SCHEMES = ("sentinel", "sentinels")


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisTarget:
    """`shown` has no secret."""

    client: Redis
    shown: str


class _Waits(TypedDict):
    socket_timeout: float
    socket_connect_timeout: float


class _TlsArguments(TypedDict, total=False):
    ssl_ca_certs: str | None
    ssl_certfile: str | None
    ssl_keyfile: str | None
    ssl_cert_reqs: str
    ssl_check_hostname: bool


def redis_targets(urls: Sequence[str], *, timeout_s: float, tls: TlsFiles) -> list[RedisTarget]:
    """Raises SettingsError for what is no URL, and for files that cannot be used."""
    client_context(tls)
    sentinels = [url for url in urls if url.partition("://")[0] in SENTINEL_SCHEMES]
    if not sentinels:
        return [RedisTarget(client=_server(url, timeout_s, tls), shown=redacted(url)) for url in urls]
    if len(sentinels) < len(urls):
        raise SettingsError("give either sentinels or servers as Redis URLs, not both")
    return [RedisTarget(client=_behind_sentinels(sentinels, timeout_s, tls), shown=redacted_list(sentinels))]


def _server(url: str, timeout_s: float, tls: TlsFiles) -> Redis:
    full = url if "://" in url else f"redis://{url}"
    extra = _tls_arguments(tls) if full.startswith("rediss://") else {}
    try:
        pool = ConnectionPool.from_url(
            full,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            **_waits(timeout_s),
            **extra,
        )
    except ValueError:
        raise SettingsError(f"{redacted(url)} is not a Redis URL: it takes redis://, rediss://, unix:// or sentinel://") from None
    return Redis.from_pool(pool)


def _behind_sentinels(urls: Sequence[str], timeout_s: float, tls: TlsFiles) -> Redis:
    parsed = [parse_server_url(url, schemes=SENTINEL_SCHEMES, default_port=26379) for url in urls]
    first = parsed[0]
    names = {unquote(parts.path.strip("/")) for parts in parsed}
    if len(names) != 1 or not first.path.strip("/"):
        raise SettingsError("each sentinel URL ends with the name of the same primary: sentinel://host:26379/NAME")
    _, credentials = take_credentials(first)
    secure = first.scheme == "sentinels"
    extra = _tls_arguments(tls) if secure else {}
    waits = _waits(timeout_s)
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        [(parts.hostname, parts.port) for parts in parsed],
        sentinel_kwargs={**waits, **extra, "ssl": secure, "protocol": 2, "retry": Retry(NoBackoff(), 0)},
    )
    client: Redis = sentinel.master_for(
        names.pop(),
        username=credentials.user or None,
        password=credentials.password or credentials.token,
        db=_database(first),
        protocol=2,
        retry=Retry(NoBackoff(), 0),
        ssl=secure,
        **waits,
        **extra,
    )
    return client


def _waits(timeout_s: float) -> _Waits:
    """Half of the time-out for each wait, so that giving an operation up (UNWATCH on a dead server) is bounded as well."""
    return {"socket_timeout": timeout_s / 2, "socket_connect_timeout": timeout_s / 2}


def _database(parts: SplitResult) -> int:
    text = parse_qs(parts.query).get("database", ["0"])[0]
    if not text.isdigit():
        raise SettingsError("?database= of a sentinel URL takes a number")
    return int(text)


def _tls_arguments(tls: TlsFiles) -> _TlsArguments:
    return {
        "ssl_ca_certs": tls.ca,
        "ssl_certfile": tls.certificate,
        "ssl_keyfile": tls.key,
        "ssl_cert_reqs": "required",
        "ssl_check_hostname": True,
    }
