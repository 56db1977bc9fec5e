"""The released wire formats, kept as bytes: `python -m tests.wire_fixtures` writes what is missing of the present version.

One file a message, `v1/inbox.Dispatch.0.bin`: the decoder, the message, a number. What was released is never written again: a
release that changes a field then fails on the bytes that its neighbours really send.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.protocol.messages import encode
from common.protocol.wire_version import WIRE_VERSION
from tests.example_messages import MESSAGES

FOLDER = Path(__file__).parent / "fixtures" / "wire"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixture:
    version: int
    decoder: str
    message: str
    path: Path


def kept() -> list[Fixture]:
    """All that was released, of every version."""
    found = []
    for path in sorted(FOLDER.glob("v*/*.bin")):
        decoder, message, _ = path.stem.split(".")
        found.append(Fixture(version=int(path.parent.name[1:]), decoder=decoder, message=message, path=path))
    return found


def wanted() -> Iterator[tuple[Path, bytes]]:
    """The examples of the present version, and where they belong."""
    seen: Counter[type] = Counter()
    for message, decode in MESSAGES:
        name = f"{decode.__name__.removeprefix('decode_')}.{type(message).__name__}.{seen[type(message)]}.bin"
        seen[type(message)] += 1
        yield FOLDER / f"v{WIRE_VERSION}" / name, encode(message)


def main() -> None:
    for path, payload in wanted():
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(payload)
            print(path.relative_to(FOLDER))


if __name__ == "__main__":
    main()
