"""The bytes of every released wire format within reach still say what they said."""

import msgspec
import pytest

from common.protocol import messages as m
from common.protocol.wire_version import WIRE_VERSION
from common.values.errors import WrongVersion
from tests.kept_values import check_kept
from tests.wire_fixtures import Fixture, kept

within_reach = [fixture for fixture in kept() if abs(fixture.version - WIRE_VERSION) <= 1]
beyond = [fixture for fixture in kept() if abs(fixture.version - WIRE_VERSION) > 1]


def decoded(fixture: Fixture) -> msgspec.Struct:
    message: msgspec.Struct = getattr(m, f"decode_{fixture.decoder}")(fixture.path.read_bytes())
    return message


@pytest.mark.parametrize("fixture", within_reach, ids=[f"v{f.version}-{f.path.stem}" for f in within_reach])
def test_a_released_message_is_read_and_written_again_without_loss(fixture: Fixture) -> None:
    message = decoded(fixture)
    assert type(message).__name__ == fixture.message
    check_kept(msgspec.msgpack.decode(fixture.path.read_bytes()), msgspec.msgpack.decode(m.encode(message)), fixture.message)


def test_what_is_beyond_reach_is_refused_as_such() -> None:
    for fixture in beyond:
        with pytest.raises(WrongVersion):
            decoded(fixture)


def test_every_message_of_the_present_version_is_kept() -> None:
    kinds = {kind.__name__ for kind in vars(m).values() if isinstance(kind, type) and issubclass(kind, m.Wire) and kind is not m.Wire}
    missing = kinds - {fixture.message for fixture in kept() if fixture.version == WIRE_VERSION}
    assert not missing, "run `python -m tests.wire_fixtures`, and keep what it writes"
