"""The released formats of the store, kept as bytes: `python -m tests.stored_fixtures` writes what is missing.

Two files an example, `v1/request_record.ended.bin` and `.json`: what lay in the store, and what the release that wrote it
read there. Neither is ever written again: a release that loses a field, or understands it otherwise, fails on them. A new
field needs a new example (`tests/stored_formats.py`), under a new name.
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from tests.stored_formats import FORMATS, StoredFormat, examples

FOLDER = Path(__file__).parent / "fixtures" / "stored"
VERSION = "v1"
"""As in the names of the keys."""
_FORMATS = {format_.name: format_ for format_ in FORMATS}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFixture:
    path: Path
    format: StoredFormat
    name: str

    @property
    def stored(self) -> Any:
        return msgspec.msgpack.decode(self.path.read_bytes())

    @property
    def understood(self) -> Any:
        """As the release that wrote it did."""
        return msgspec.json.decode(self.path.with_suffix(".json").read_bytes())

    async def read(self) -> Any:
        """As this release does."""
        return as_json(await self.format.read(self.stored))


def kept() -> list[StoredFixture]:
    found = []
    for path in sorted(FOLDER.glob("v*/*.bin")):
        format_, name = path.stem.split(".")
        found.append(StoredFixture(path=path, format=_FORMATS[format_], name=name))
    return found


def as_json(value: object) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value))


async def write_missing() -> list[Path]:
    written = []
    for format_, name, stored in await examples():
        path = FOLDER / VERSION / f"{format_}.{name}.bin"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.msgpack.encode(stored))
        understood = msgspec.json.encode(await _FORMATS[format_].read(stored))
        path.with_suffix(".json").write_bytes(msgspec.json.format(understood, indent=1) + b"\n")
        written.append(path)
    return written


if __name__ == "__main__":
    for made in asyncio.run(write_missing()):
        print(made.relative_to(FOLDER))
