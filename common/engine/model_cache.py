"""Where converted models and digests are kept on this host, and how several processes share that place.

Two workers start at once and want the same model: whoever takes the lock makes it, the other waits and finds it. What is
made appears by one rename, so that nobody ever sees half a model; what a killed process left half made is removed by the
next one that takes the lock. The lock is the kernel's (flock): it goes when its holder dies.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import xxhash

from common.values.errors import ModelError

Progress = Callable[[str, float], None]
"""Told what is being done and which part of it is done, 0.0 to 1.0."""
_READ_BYTES = 8 * 2**20


def no_progress(what: str, fraction: float) -> None:
    """The callback of those who do not watch."""


def default_cache_dir(environment: Mapping[str, str]) -> Path:
    """`SEGUE_CACHE_DIR`, else `segue` under `XDG_CACHE_HOME`, else `~/.cache/segue`."""
    if own := environment.get("SEGUE_CACHE_DIR"):
        return Path(own).expanduser()
    if shared := environment.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "segue"
    return Path("~/.cache/segue").expanduser()


@contextlib.contextmanager
def host_lock(cache_dir: Path, name: str, *, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold `name` on this host; `waiting` is called once where another process holds it now."""
    locks = make_folder(cache_dir / "locks")
    with open(locks / f"{name}.lock", "a", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def publish_folder(target: Path, make: Callable[[Path], None]) -> None:
    """Let `make` fill a new folder, then give it the name `target` in one step. The caller holds the lock of `target`."""
    for left_over in target.parent.glob(f".{target.name}.*.partial"):
        shutil.rmtree(left_over, ignore_errors=True)
    partial = make_folder(target.parent / f".{target.name}.{os.getpid()}.partial")
    try:
        make(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def make_folder(path: Path) -> Path:
    """Raises ModelError, naming the settings that move the cache, where the folder cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"cannot use the cache folder {path}: {error.strerror}. Set SEGUE_CACHE_DIR to a writable folder") from error
    return path


def require_room(folder: Path, needed_bytes: int) -> None:
    """Refuse before writing what the disk cannot hold."""
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise ModelError(
            f"the converted model needs {needed_bytes / 2**30:.2f} GiB in {folder}, where {free / 2**30:.2f} GiB are free. "
            "Set SEGUE_CACHE_DIR to a folder on a larger disk"
        )


def file_digest(path: Path, cache_dir: Path) -> str:
    """xxh3_128 of the file's bytes as hex.

    Reading a large file is paid once: the digest is kept under the file's path, size and modification time.
    """
    status = path.stat()
    identity = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
    kept = make_folder(cache_dir / "digests") / f"{xxhash.xxh3_128_hexdigest(identity.encode())}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        entry = json.loads(kept.read_text(encoding="utf-8"))
        if entry["identity"] == identity:
            return str(entry["xxh3_128"])
    digest = _digest_bytes(path)
    partial = kept.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time at the next start, nothing else
        partial.write_text(json.dumps({"identity": identity, "xxh3_128": digest}), encoding="utf-8")
        partial.rename(kept)
    return digest


def _digest_bytes(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as handle:
        while chunk := handle.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
