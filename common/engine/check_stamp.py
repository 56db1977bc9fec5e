"""Remembers on this host that a model passed the self-check, so that the next start of a worker need not ask again.

The stamp names everything that the answer depends on: the model's files, dtype, layout and device, the versions of torch and
transformers, and the code of this package. Whatever changes, the check is made again.
"""

import hashlib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGE = Path(__file__).parent


def stamp_path(cache_dir: Path, depends_on: Iterable[str]) -> Path:
    """The file whose presence says that the check was passed. `depends_on`: what is special to this model and worker."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (*depends_on, *(f"{name} {_version(name)}" for name in ("torch", "transformers"))):
        digest.update(part.encode() + b"\0")
    for source in sorted(path for kind in ("*.py", "*.cpp", "*.h") for path in _PACKAGE.rglob(kind)):
        digest.update(source.read_bytes())
    return cache_dir / "checked" / digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
