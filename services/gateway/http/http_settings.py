"""What an operator may set of the HTTP side, validated where it is made."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from common.values.errors import SettingsError
from common.values.request_class import RequestClass
from services.gateway.http.api_keys import split_key


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """`sse_keepalive_s`: the 200 goes out after this silence at the latest, and a comment after each further one.
    `header_timeout_s` and `body_timeout_s` bound how slowly a request may arrive, `slow_reader_timeout_s` how long a client
    may take nothing of its answer. `insecure` allows other hosts than loopback without a key."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    insecure: bool = False
    max_body_bytes: int = 8 * 2**20
    max_concurrent_requests: int = 1024
    max_connections: int = 4096
    sse_keepalive_s: float = 5.0
    header_timeout_s: float = 20.0
    body_timeout_s: float = 60.0
    keep_alive_s: float = 65.0
    slow_reader_timeout_s: float = 60.0
    drain_timeout_s: float = 30.0
    request_deadline_s: float | None = None
    websocket_max_requests: int = 64
    websocket_ping_s: float = 20.0
    classes: tuple[RequestClass, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise SettingsError(f"port must be between 0 and 65535, not {self.port}")
        for name in ("max_body_bytes", "max_concurrent_requests", "max_connections", "websocket_max_requests"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1")
        for name in ("sse_keepalive_s", "header_timeout_s", "body_timeout_s", "slow_reader_timeout_s", "websocket_ping_s"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} must be above 0")
        if not all(key and key.isascii() and key == key.strip() for key in self.api_keys):
            raise SettingsError("an API key must be printable ASCII without blanks around it")
        known = {each.name for each in self.classes}
        for name in filter(None, (split_key(key)[1] for key in self.api_keys)):
            if name not in known:
                raise SettingsError(f"an API key is bound to the class {name}, which there is not (--request-class)")
        if not (self.api_keys or self.insecure or _is_loopback(self.host)):
            raise SettingsError(
                f"host {self.host} can be reached from other machines: give an API key (--api-key or --api-key-file), or --insecure"
            )


def read_api_keys(path: Path) -> tuple[str, ...]:
    """One key a line; empty lines and lines that start with # are skipped."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"the API key file {path} cannot be read: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise SettingsError(f"the API key file {path} holds no key")
    return keys


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
