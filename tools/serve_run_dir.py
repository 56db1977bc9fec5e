"""The folder of one running `segue serve`: keys, settings of the children, logs. Private, and removed at the end.

It is locked while its owner lives. What an owner that was killed left behind is removed by the next start.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.runtime.core_claims import private_folder
from common.values.errors import SettingsError

LOCK = "lock"
LOGS = "logs"


@dataclass(slots=True)
class RunFolder:
    """`keep_logs` leaves the logs, and nothing else, when the folder is given up."""

    path: Path
    keep_logs: bool


@contextlib.contextmanager
def run_folder(given: str | None, *, base: str | None = None) -> Iterator[RunFolder]:
    """A new folder, or the given one, in which logs stay. Raises SettingsError where it cannot be used."""
    if given is None:
        parent = private_folder("run", base=base)
        remove_abandoned(parent)
        folder = RunFolder(Path(tempfile.mkdtemp(prefix="serve-", dir=parent)), keep_logs=False)
    else:
        folder = RunFolder(Path(given).expanduser().resolve(), keep_logs=True)
    try:
        folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder.path / LOCK).open("a")
        (folder.path / LOGS).mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"run folder {folder.path}: {error}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(f"run folder {folder.path} is in use by another segue serve") from None
        try:
            yield folder
        finally:
            _give_up(folder, own=given is None)


def remove_abandoned(parent: Path) -> None:
    """Remove the folders whose owner is dead: their lock is free. Logs that were kept on purpose stay for the last few."""
    folders = sorted((path for path in parent.glob("serve-*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
    kept = [path for path in folders if not (path / LOCK).exists()]
    for path in kept[:-3]:
        shutil.rmtree(path, ignore_errors=True)
    for path in set(folders) - set(kept):
        with contextlib.suppress(OSError), (path / LOCK).open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)


def _give_up(folder: RunFolder, *, own: bool) -> None:
    if own and not folder.keep_logs:
        shutil.rmtree(folder.path, ignore_errors=True)
        return
    for path in folder.path.iterdir():
        if path.is_file() and (own or path.name == LOCK or path.suffix in (".toml", ".conf", ".key")):
            with contextlib.suppress(OSError):
                os.unlink(path)
