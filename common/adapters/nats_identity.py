"""Checks the files with which a client proves itself to NATS, before nats-py fails on them deep inside a connection."""

from importlib.util import find_spec
from pathlib import Path

from common.values.errors import SettingsError
from common.values.server_access import NatsIdentity

_MARKS = {"nats_creds_file": ("BEGIN NATS USER JWT", "END USER NKEY SEED"), "nats_nkey_file": ("SU",)}


def checked_identity(identity: NatsIdentity) -> NatsIdentity:
    """The same; raises SettingsError, showing nothing of their content, where they cannot be used."""
    given = {
        name: path
        for name, path in (("nats_creds_file", identity.creds_file), ("nats_nkey_file", identity.nkey_file))
        if path is not None
    }
    if len(given) > 1:
        raise SettingsError("nats_creds_file and nats_nkey_file are two ways to say the same: give one")
    for name, path in given.items():
        try:
            content = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"{name} {path}: cannot be read ({error})") from None
        if not all(mark in content for mark in _MARKS[name]):
            raise SettingsError(f"{name} {path}: holds no {' and '.join(_MARKS[name])}")
        if find_spec("nkeys") is None:
            raise SettingsError(f"{name} needs the package nkeys, which signs with such keys: pip install nkeys")
    return identity
