"""Server URLs as users write them: show them without secrets, and take the secrets out decoded.

Log lines and error messages name the server that cannot be reached; the password in its URL must never be there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from common.values.errors import SettingsError


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What an URL's `user:password@` or `token@` says, percent-decoded. All None where there is nothing."""

    user: str | None = None
    password: str | None = None
    token: str | None = None


def redacted(url: str) -> str:
    """The URL with everything before the `@` of its host, and its query, replaced by `***`."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    rest, _, query = rest.partition("?")
    _, at, rest = rest.rpartition("@")
    return f"{scheme}{separator}{'***@' if at else ''}{rest}{'?***' if query else ''}"


def redacted_list(urls: Sequence[str]) -> str:
    return ", ".join(redacted(url) for url in urls)


def parse_server_url(url: str, *, schemes: Sequence[str], default_port: int) -> SplitResult:
    """Check scheme, host and port; raises SettingsError, showing no secret.

    A bare `host` or `host:port` gets the first of `schemes`; a missing port becomes `default_port`.
    """
    try:
        parts = urlsplit(url if "://" in url else f"{schemes[0]}://{url}")
        port = parts.port
    except ValueError as error:
        raise SettingsError(f"{redacted(url)} is not a server URL (write {schemes[0]}://host:{default_port})") from error
    if parts.scheme not in schemes or not parts.hostname:
        raise SettingsError(f"{redacted(url)} is not a server URL: it takes {' or '.join(schemes)}://host:{default_port}")
    return parts if port is not None else parts._replace(netloc=f"{parts.netloc.rstrip(':')}:{default_port}")


def take_credentials(parts: SplitResult) -> tuple[str, Credentials]:
    """The URL without its credentials, and the credentials. A lone `name@` is a token, as NATS has it."""
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    if parts.username is None:
        return bare, Credentials()
    if parts.password is None:
        return bare, Credentials(token=unquote(parts.username))
    return bare, Credentials(user=unquote(parts.username), password=unquote(parts.password))
