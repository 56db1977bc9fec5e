"""Where settings come from, in order of strength: defaults < file < environment `SEGUE_…` < flags.

A group of settings is a frozen dataclass whose fields were made by `setting(...)`. Everything is read once, at the start;
an unknown key or a value of the wrong kind stops the start with the key's name, what it takes, and the nearest known key.
"""

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from common.runtime.settings_kinds import Kind
from common.values.errors import SettingsError

T = TypeVar("T")
ENVIRONMENT_PREFIX = "SEGUE_"
SHARED_TABLE = "mesh"
_METADATA_KEY = "segue"
_KUBERNETES_LINK = re.compile(r"_(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting as people meet it. `key` is its name in files, with dashes its flag, in capitals its variable."""

    field: str
    key: str
    kind: Kind[object]
    means: str
    default: object
    shown_default: str
    aliases: tuple[str, ...] = ()
    secret: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.key.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.key.upper()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Declared:
    kind: Kind[object]
    means: str
    key: str | None
    shown_default: str | None
    aliases: tuple[str, ...]
    secret: bool


def setting(
    kind: Kind[T],
    default: T,
    means: str,
    *,
    key: str | None = None,
    shown_default: str | None = None,
    aliases: tuple[str, ...] = (),
    secret: bool = False,
) -> T:
    """Declare a field of a settings dataclass. `shown_default` describes a computed default in the table of settings;
    the value of a `secret` one appears in no error and no repr."""
    declared = _Declared(
        kind=cast("Kind[object]", kind), means=means, key=key, shown_default=shown_default, aliases=aliases, secret=secret
    )
    return dataclasses.field(default=default, repr=not secret, metadata={_METADATA_KEY: declared})


def settings_of(group: type[object]) -> tuple[Setting, ...]:
    """The settings that a dataclass declares, in its order."""
    if not dataclasses.is_dataclass(group):
        raise TypeError(f"{group.__name__} is no dataclass")
    found = []
    for item in dataclasses.fields(group):
        declared = item.metadata.get(_METADATA_KEY)
        if isinstance(declared, _Declared):
            found.append(_named(item.name, item.default, declared))
    return tuple(found)


def _named(field: str, default: object, declared: _Declared) -> Setting:
    shown = declared.shown_default if declared.shown_default is not None else show_value(default)
    return Setting(
        field=field,
        key=declared.key or field,
        kind=declared.kind,
        means=declared.means,
        default=default,
        shown_default=shown,
        aliases=declared.aliases,
        secret=declared.secret,
    )


def show_value(value: object) -> str:
    """A value as one would write it behind a flag."""
    if value is None:
        return "auto"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return str(value)


@dataclass(frozen=True, slots=True)
class Given:
    """A value as it was given, and where."""

    value: object
    origin: str


def read_value(setting: Setting, given: Given) -> object:
    try:
        return setting.kind.read(given.value)
    except (ValueError, TypeError):
        shown = "" if setting.secret else f", not {str(given.value)[:80]!r}"
        raise SettingsError(f"{given.origin}: {setting.key} takes {setting.kind.takes}{shown}") from None


def unknown(kind: str, name: str, known: Sequence[str], origin: str) -> SettingsError:
    """The error for a key that nobody knows, with the nearest one that is known."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else "; `segue settings` lists all"
    return SettingsError(f"{origin}: unknown {kind} {name}{hint}")


def from_environment(settings: Sequence[Setting], environ: Mapping[str, str], *, known_elsewhere: frozenset[str]) -> dict[str, Given]:
    """Key → value for the variables that belong to `settings`; raises on a SEGUE_ variable that nobody knows.

    `known_elsewhere` are variables of other groups and of the process plumbing. Variables that Kubernetes makes for a
    service whose name begins with "segue" are left alone.
    """
    by_variable = {item.variable: item for item in settings}
    found: dict[str, Given] = {}
    for name, value in environ.items():
        if not name.startswith(ENVIRONMENT_PREFIX) or _is_kubernetes_link(name, value):
            continue
        item = by_variable.get(name)
        if item is not None:
            found[item.key] = Given(value, f"environment variable {name}")
        elif name not in known_elsewhere:
            raise unknown("variable", name, [*by_variable, *known_elsewhere], "environment")
    return found


def _is_kubernetes_link(name: str, value: str) -> bool:
    return _KUBERNETES_LINK.search(name) is not None or (name.endswith("_PORT") and value.startswith(("tcp://", "udp://", "sctp://")))


def from_file(
    path: Path, settings: Sequence[Setting], *, table: str, tables: frozenset[str], known_elsewhere: frozenset[str]
) -> dict[str, Given]:
    """Key → value of a TOML file (or YAML, where PyYAML is installed and the name ends in .yaml or .yml).

    A key at the top is for every service that knows it, `[mesh]` for all; a table named after a service is for it alone.
    Tables of other services are not looked into, so one file may serve a whole mesh.
    """
    content = _load(path)
    origin = f"file {path}"
    by_key = {name: item for item in settings for name in (item.key, item.key.replace("_", "-"))}
    found: dict[str, Given] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            if name not in tables:
                raise unknown("table", name, sorted(tables), origin)
        elif name in by_key:
            found[by_key[name].key] = Given(value, origin)
        elif name.replace("-", "_") not in known_elsewhere:
            raise unknown("key", name, sorted({*known_elsewhere, *(item.key for item in settings)}), origin)
    for section in (SHARED_TABLE, table):
        own = content.get(section, {})
        for name, value in own.items() if isinstance(own, dict) else ():
            if name not in by_key:
                raise unknown("key", name, [item.key for item in settings], f"{origin}, [{section}]")
            found[by_key[name].key] = Given(value, f"{origin}, [{section}]")
    return found


def _load(path: Path) -> dict[str, object]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path}: cannot be read ({error})") from None
    if path.suffix in (".yaml", ".yml"):
        return _load_yaml(path, text)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"--config {path}: is not TOML ({error})") from None


def _load_yaml(path: Path, text: str) -> dict[str, object]:
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError:
        raise SettingsError(f"--config {path}: YAML needs PyYAML (`pip install pyyaml`); a .toml file needs nothing") from None
    try:
        content = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise SettingsError(f"--config {path}: is not YAML ({error})") from None
    if not isinstance(content, dict):
        raise SettingsError(f"--config {path}: must be a mapping of keys to values")
    return {str(key): value for key, value in content.items()}


def from_flags(settings: Sequence[Setting], arguments: Sequence[str]) -> tuple[dict[str, Given], list[str]]:
    """Key → value of the flags, and the arguments that are no flags. Understood are `--flag value`, `--flag=value`,
    `--switch`, `--no-switch`; a repeated flag replaces, or adds to a list."""
    by_flag = {name: item for item in settings for name in (item.flag, *item.aliases)}
    switched_off = {f"--no-{flag[2:]}": item for flag, item in by_flag.items() if item.kind.switch}
    found: dict[str, Given] = {}
    rest: list[str] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if argument == "--":
            rest += waiting
            break
        if not argument.startswith("--"):
            if argument.startswith("-") and len(argument) > 1:
                raise unknown("flag", argument, [*by_flag, *switched_off], "command line")
            rest.append(argument)
            continue
        flag, equals, value = argument.partition("=")
        if flag in switched_off and not equals:
            found[switched_off[flag].key] = Given("false", f"flag {flag}")
            continue
        if flag not in by_flag:
            raise unknown("flag", flag, [*by_flag, *switched_off], "command line")
        item = by_flag[flag]
        if not equals:
            value = _value_behind(item, flag, waiting)
        before = found.get(item.key)
        joined = f"{before.value},{value}" if before is not None and item.kind.many else value
        found[item.key] = Given(joined, f"flag {flag}")
    return found, rest


def _value_behind(item: Setting, flag: str, waiting: list[str]) -> str:
    if item.kind.switch:
        return "true"
    if not waiting or waiting[0].startswith("--"):
        raise SettingsError(f"flag {flag} needs a value: {item.key} takes {item.kind.takes}")
    return waiting.pop(0)
