"""What any release has left in the store still says what it said; and what this one writes, an earlier one can read."""

from collections import defaultdict
from typing import Any

import msgspec
import pytest

from tests.kept_values import check_kept
from tests.stored_fixtures import StoredFixture, kept
from tests.stored_formats import FORMATS, examples

KEPT = kept()


def unpacked(stored: Any) -> Any:
    """With the records within the record laid open."""
    if isinstance(stored, dict):
        return {name: unpacked(value) for name, value in stored.items()}
    if isinstance(stored, list):
        return [unpacked(value) for value in stored]
    if not isinstance(stored, bytes):
        return stored
    try:
        inner = msgspec.msgpack.decode(stored)
    except msgspec.DecodeError:
        return stored
    return unpacked(inner) if isinstance(inner, dict | list) else stored


@pytest.mark.parametrize("fixture", KEPT, ids=[fixture.path.stem for fixture in KEPT])
async def test_what_was_stored_is_read_as_it_was(fixture: StoredFixture) -> None:
    check_kept(fixture.understood, await fixture.read(), fixture.path.stem)


async def test_what_is_written_now_holds_all_that_was_written_then() -> None:
    """So that an earlier release finds its fields, where a mesh is rolled back."""
    now = {(format_, name): unpacked(stored) for format_, name, stored in await examples()}
    for fixture in KEPT:
        written = now[fixture.format.name, fixture.name]
        check_kept(unpacked(fixture.stored), written, fixture.path.stem)


async def test_every_example_is_kept() -> None:
    names = {(fixture.format.name, fixture.name) for fixture in KEPT}
    missing = {(format_, name) for format_, name, _ in await examples()} - names
    assert not missing, "run `python -m tests.stored_fixtures`, and keep what it writes"
    assert {format_ for format_, _ in names} == {format_.name for format_ in FORMATS}


async def test_every_field_that_is_read_is_kept_with_a_value_of_its_own() -> None:
    """A new field needs an example: add one to tests/stored_formats.py, under a new name."""
    values: defaultdict[str, set[str]] = defaultdict(set)
    fields: set[str] = set()
    for fixture in KEPT:
        _gather(fixture.understood, fixture.format.name, values)
        fields |= set(_gather(await fixture.read(), fixture.format.name, defaultdict(set)))
    for field in sorted(fields):
        assert values[field] - {"None"}, f"no fixture has a value of {field}"


def _gather(value: Any, where: str, values: defaultdict[str, set[str]]) -> defaultdict[str, set[str]]:
    """By path, all values at the leaves; places in a list do not count."""
    if isinstance(value, dict):
        values[where].add("{}")
        for name, inner in value.items():
            _gather(inner, f"{where}.{name}", values)
    elif isinstance(value, list):
        values[where].add("[]")
        for inner in value:
            _gather(inner, f"{where}[]", values)
    else:
        values[where].add(repr(value))
    return values
