"""Which releases of the wire format understand each other: N takes what N-1, N and N+1 send.

So a mesh is upgraded, and rolled back, one process after another. Within that window fields are only added, with defaults, and
unknown ones are ignored. What is further away is refused as such, not misread. `tests/fixtures/wire` keeps each released format.
"""

import msgspec

from common.values.errors import WrongVersion

WIRE_VERSION = 1


class _Version(msgspec.Struct, frozen=True):
    v: int


_decoder = msgspec.msgpack.Decoder(_Version)


def check_version(version: int) -> None:
    """Raises WrongVersion."""
    if abs(version - WIRE_VERSION) > 1:
        raise WrongVersion(f"a message of wire version {version}; this release is {WIRE_VERSION} and takes one more or less")


def check_version_of(payload: bytes) -> None:
    """The same for a message that cannot be decoded: perhaps because it is of another time."""
    try:
        version = _decoder.decode(payload).v
    except (msgspec.DecodeError, ValueError, RecursionError):
        return
    check_version(version)
