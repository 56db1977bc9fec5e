"""Every message on the wire: round trips, the future's fields, and what is refused."""

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.protocol import messages as m
from common.protocol.wire_version import WIRE_VERSION
from common.values.errors import PeerError, WrongVersion
from tests.example_messages import ALONE, CONTROL, DECODERS, INBOX, ITEM, MESSAGES

every_message = pytest.mark.parametrize(("message", "decode"), MESSAGES, ids=[type(message).__name__ for message, _ in MESSAGES])


def as_map(message: msgspec.Struct) -> dict[str, Any]:
    value = msgspec.msgpack.decode(m.encode(message))
    assert isinstance(value, dict)
    return value


def pack(value: object) -> bytes:
    return msgspec.msgpack.encode(value)


def test_every_message_of_the_protocol_is_among_these() -> None:
    mine = {type(message) for message, _ in MESSAGES}
    theirs = {kind for kind in vars(m).values() if isinstance(kind, type) and issubclass(kind, m.Wire) and kind is not m.Wire}
    assert mine == theirs


@every_message
def test_a_round_trip_changes_nothing(message: msgspec.Struct, decode: Callable[[bytes], msgspec.Struct]) -> None:
    decoded = decode(m.encode(message))
    assert decoded == message
    assert type(decoded) is type(message)


@every_message
def test_fields_of_a_later_release_are_ignored(message: msgspec.Struct, decode: Callable[[bytes], msgspec.Struct]) -> None:
    assert decode(pack(as_map(message) | {"of_a_later_release": [1, {"a": b"b"}], "v": WIRE_VERSION + 1})) == msgspec.structs.replace(
        message, v=WIRE_VERSION + 1
    )


@every_message
@pytest.mark.parametrize("distance", [-3, -2, 2, 3])
def test_a_version_that_is_too_far_away_is_refused_as_such(
    message: msgspec.Struct, decode: Callable[[bytes], msgspec.Struct], distance: int
) -> None:
    with pytest.raises(WrongVersion):
        decode(pack(as_map(message) | {"v": WIRE_VERSION + distance}))
    with pytest.raises(WrongVersion):
        decode(pack({"v": WIRE_VERSION + distance, "all": "different"}))


@every_message
@pytest.mark.parametrize("distance", [-1, 1])
def test_the_neighbouring_versions_are_taken(
    message: msgspec.Struct, decode: Callable[[bytes], msgspec.Struct], distance: int
) -> None:
    version = WIRE_VERSION + distance
    assert decode(pack(as_map(message) | {"v": version})) == msgspec.structs.replace(message, v=version)


@every_message
def test_a_missing_field_or_one_of_another_type_is_refused(message: msgspec.Struct, decode: Callable[[bytes], msgspec.Struct]) -> None:
    fields = as_map(message)
    required = {field.encode_name for field in msgspec.structs.fields(message) if field.required}
    for name in fields:
        without = {key: value for key, value in fields.items() if key != name}
        if name in required:
            with pytest.raises(PeerError):
                decode(pack(without))
        wrong: tuple[object, ...] = ("text",) if isinstance(fields[name], float) else (3.5, [[]], {"x": 1})
        for value in wrong:
            with pytest.raises(PeerError):
                decode(pack(fields | {name: value}))


def too_large_or_out_of_range() -> Iterator[tuple[dict[str, Any], Callable[[bytes], msgspec.Struct]]]:
    dispatch = as_map(INBOX[0])
    choice = {"choice": 0, "tokens": []}
    yield dispatch | {"request_id": ""}, m.decode_inbox
    yield dispatch | {"request_id": "r" * 257}, m.decode_inbox
    yield dispatch | {"attempt": -1}, m.decode_inbox
    yield dispatch | {"choices": []}, m.decode_inbox
    yield dispatch | {"choices": [choice] * (m.MAX_CHOICES + 1)}, m.decode_inbox
    yield dispatch | {"choices": [choice | {"choice": m.MAX_CHOICES}]}, m.decode_inbox
    yield dispatch | {"type": "offer"}, m.decode_inbox
    for changes in ({"max_tokens": 0}, {"temperature": -1.0}, {"seed": -1}, {"logprobs": 21}, {"stop_token_ids": [1] * 65}):
        yield dispatch | {"sampling": dispatch["sampling"] | changes}, m.decode_inbox
    held = as_map(next(message for message in CONTROL if isinstance(message, m.Held)))
    yield held | {"sequences": held["sequences"] * (m.MAX_ENTRIES + 1)}, m.decode_control
    yield as_map(CONTROL[1]) | {"positions": -1}, m.decode_control
    yield as_map(CONTROL[4]) | {"reason": "because"}, m.decode_control
    item = as_map(ITEM)
    yield {"items": [item] * (m.MAX_ENTRIES + 1)}, m.decode_replay_request
    yield {"items": [item | {"next_index": -1}]}, m.decode_replay_request
    frames = as_map(ALONE[1][0])
    yield frames | {"entries": frames["entries"] * (m.MAX_ENTRIES + 1)}, m.decode_token_frame


@pytest.mark.parametrize(("fields", "decode"), list(too_large_or_out_of_range()))
def test_what_is_too_large_or_out_of_range_is_refused(fields: dict[str, Any], decode: Callable[[bytes], msgspec.Struct]) -> None:
    with pytest.raises(PeerError):
        decode(pack(fields))


@pytest.mark.parametrize("decode", DECODERS, ids=[decode.__name__ for decode in DECODERS])
def test_deep_nesting_is_refused(decode: Callable[[bytes], msgspec.Struct]) -> None:
    bomb = b"\x81\xa1x" + b"\x91" * 100_000 + b"\xc0"
    with pytest.raises(PeerError):
        decode(bomb)


@given(st.binary(max_size=60), st.sampled_from(DECODERS))
def test_any_bytes_decode_or_are_a_peer_error(payload: bytes, decode: Callable[[bytes], msgspec.Struct]) -> None:
    try:
        decode(payload)
    except PeerError:
        return


@given(st.sampled_from(MESSAGES), st.data())
def test_a_damaged_message_decodes_or_is_a_peer_error(
    pair: tuple[msgspec.Struct, Callable[[bytes], msgspec.Struct]], data: st.DataObject
) -> None:
    message, decode = pair
    payload = bytearray(m.encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode(bytes(payload[: data.draw(st.integers(0, len(payload)))]))
    except PeerError:
        return


@given(st.lists(st.integers(0, 2**31 - 1), max_size=50))
def test_token_ids_travel_as_little_endian_words(ids: list[int]) -> None:
    packed = m.pack_ids(ids)
    assert packed == b"".join(token.to_bytes(4, "little") for token in ids)
    assert m.unpack_ids(packed) == tuple(ids)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_token_ids_come_whole(size: int) -> None:
    with pytest.raises(PeerError):
        m.unpack_ids(b"\0" * size)
