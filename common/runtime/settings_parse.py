"""From arguments, environment and file to the settings of a service: each main calls one of these, once."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from common.runtime.own_address import AUTO_HOST, address_towards
from common.runtime.settings import GatewaySettings, MeshSettings, WorkerSettings
from common.runtime.settings_kinds import TEXT, auto_or
from common.runtime.settings_planner import PlannerSettings
from common.runtime.settings_serve import ServeSettings
from common.runtime.settings_sources import Given, Setting, from_environment, from_file, from_flags, read_value, setting, settings_of
from common.runtime.settings_table import help_text
from common.values.errors import SettingsError
from common.values.worker import Role

GroupT = TypeVar("GroupT")
PLUMBING_VARIABLES = frozenset({"SEGUE_CONFIG", "SEGUE_NOTIFY_FD", "SEGUE_CACHE_DIR", "SEGUE_UCX_LIBRARY"})
"""Variables with our prefix that are no settings: the supervisor's pipe, the model cache, an own libucp."""
TABLES = frozenset({"mesh", "gateway", "worker", "planner", "serve"})
MADE_BY_SERVE = frozenset({"worker_id", "role", "control_port", "status_port", "gateway_id", "planner_id", "listen_fd"})


def parse_worker_settings(argv: Sequence[str], environ: Mapping[str, str], *, default_role: Role) -> WorkerSettings:
    """The settings of `python -m services.prefill|decode [MODEL] [flags]`. Raises SettingsError."""
    values, rest = read_settings((MeshSettings, WorkerSettings), argv, environ, table="worker")
    take_model(values, rest)
    values.setdefault("role", default_role)
    if values.get("worker_id") is None:
        values["worker_id"] = f"worker-{secrets.token_hex(4)}"
    mesh = build(MeshSettings, values)
    if values.get("host") == AUTO_HOST:
        values["host"] = address_towards(mesh.nats_url)
    return build(WorkerSettings, values, mesh=mesh)


def parse_gateway_settings(argv: Sequence[str], environ: Mapping[str, str]) -> GatewaySettings:
    """The settings of `python -m services.gateway [flags]`. Raises SettingsError."""
    values, rest = read_settings((MeshSettings, GatewaySettings), argv, environ, table="gateway")
    if rest:
        raise SettingsError(f"the gateway takes no argument {rest[0]!r}")
    read_key_file(values)
    if values.get("gateway_id") is None:
        values["gateway_id"] = f"gateway-{secrets.token_hex(4)}"
    return build(GatewaySettings, values, mesh=build(MeshSettings, values))


def parse_planner_settings(argv: Sequence[str], environ: Mapping[str, str]) -> PlannerSettings:
    """The settings of `python -m services.planner [flags]`. Raises SettingsError."""
    values, rest = read_settings((MeshSettings, PlannerSettings), argv, environ, table="planner")
    if rest:
        raise SettingsError(f"the planner takes no argument {rest[0]!r}")
    if values.get("planner_id") is None:
        values["planner_id"] = f"planner-{secrets.token_hex(4)}"
    return build(PlannerSettings, values, mesh=build(MeshSettings, values))


def read_settings(
    groups: Sequence[type[object]],
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    table: str,
    without: frozenset[str] = frozenset(),
) -> tuple[dict[str, object], list[str]]:
    """Key → value for all that was given anywhere, and the positional arguments. `without` names keys not taken here.

    `--help` prints the flags and leaves the program.
    """
    chosen: dict[str, Setting] = {}
    for item in (item for group in groups for item in settings_of(group)):
        if item.key not in without:
            chosen.setdefault(item.key, item)
    settings = list(chosen.values())
    if not {"-h", "--help"}.isdisjoint(argv):
        print(help_text([_CONFIG, *settings]))
        raise SystemExit(0)
    flags, rest = from_flags([*settings, _CONFIG], argv)
    everything = all_settings()
    known_keys = frozenset(item.key for item in everything)
    known_variables = frozenset(item.variable for item in everything) | PLUMBING_VARIABLES
    given: dict[str, Given] = {}
    config = flags.pop("config").value if "config" in flags else environ.get("SEGUE_CONFIG")
    if config is not None:
        given |= from_file(Path(str(config)), settings, table=table, tables=TABLES, known_elsewhere=known_keys)
    given |= from_environment(settings, environ, known_elsewhere=known_variables) | flags
    return {key: read_value(chosen[key], value) for key, value in given.items()}, rest


def build(group: type[GroupT], values: Mapping[str, object], **parts: object) -> GroupT:
    """Make a group from key → value; what is not given keeps its default."""
    own = {item.field: values[item.key] for item in settings_of(group) if item.key in values}
    return group(**own, **parts)


def take_model(values: dict[str, object], rest: Sequence[str]) -> None:
    """The one positional argument is the model."""
    if len(rest) > 1:
        raise SettingsError(f"one MODEL at most, not {' '.join(rest)!r}")
    if rest:
        values["model"] = rest[0]


def read_key_file(values: dict[str, object]) -> None:
    """Add the keys of `api_key_file` to those given directly."""
    path = values.get("api_key_file")
    if path is None:
        return
    try:
        lines = Path(str(path)).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--api-key-file {path}: cannot be read ({error})") from None
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise SettingsError(f"--api-key-file {path}: holds no key")
    given = cast("tuple[str, ...]", values.get("api_key", ()))
    values["api_key"] = tuple(dict.fromkeys([*given, *keys]))


def all_settings() -> tuple[Setting, ...]:
    """Every setting of every service, `segue serve` included."""
    return tuple(
        item
        for group in (MeshSettings, GatewaySettings, WorkerSettings, PlannerSettings, ServeSettings)
        for item in settings_of(group)
    )


def parse_serve_settings(argv: Sequence[str], environ: Mapping[str, str]) -> ServeSettings:
    """The settings of `segue serve [MODEL] [flags]`. Raises SettingsError.

    `--host` and `--port` are the gateway's; workers of one machine meet on loopback.
    """
    groups = (ServeSettings, GatewaySettings, WorkerSettings, PlannerSettings, MeshSettings)
    values, rest = read_settings(groups, argv, environ, table="serve", without=MADE_BY_SERVE)
    take_model(values, rest)
    read_key_file(values)
    shared = {key: value for key, value in values.items() if key not in ("nats_url", "redis_url")}
    mesh = build(MeshSettings, shared)
    of_worker = {key: value for key, value in values.items() if key not in ("host", "cores")}
    return build(
        ServeSettings,
        values,
        worker=build(WorkerSettings, of_worker, mesh=mesh),
        gateway=build(GatewaySettings, values, mesh=mesh),
        planning=build(PlannerSettings, {key: value for key, value in values.items() if key not in ("host", "planner")}, mesh=mesh),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _ConfigFlag:
    config: str | None = setting(auto_or(TEXT), None, "TOML or YAML file with settings")


_CONFIG = settings_of(_ConfigFlag)[0]
