"""The settings of each service: read once, at the start, into frozen dataclasses that are passed down.

Defaults < file (`--config`) < environment (`SEGUE_…`) < flags. Flags have vLLM's names where vLLM has the thing.
`settings_sources` reads, `settings_kinds` says what a value may be, `settings_serve` is what `segue serve` adds.
"""

import ipaddress
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, cast

from common.runtime.own_address import AUTO_HOST, address_towards
from common.runtime.settings_kinds import (
    BYTES,
    CORES,
    IDENTIFIER,
    PORT,
    SWITCH,
    TEXT,
    auto_or,
    number_of_seconds,
    one_of,
    texts,
    whole,
)
from common.runtime.settings_sources import (
    Given,
    Setting,
    from_environment,
    from_file,
    from_flags,
    read_value,
    setting,
    settings_of,
)
from common.runtime.settings_table import help_text
from common.values.errors import SettingsError
from common.values.worker import Role

GroupT = TypeVar("GroupT")
PLUMBING_VARIABLES = frozenset({"SEGUE_CONFIG", "SEGUE_NOTIFY_FD", "SEGUE_CACHE_DIR", "SEGUE_UCX_LIBRARY"})
"""Variables with our prefix that are no settings: the supervisor's pipe, the model cache, an own libucp."""
TABLES = frozenset({"mesh", "gateway", "worker", "serve"})


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshSettings:
    """What every member of a mesh needs: where the brokers are, the shared key, and how to log."""

    name: str = setting(IDENTIFIER, "default", "name of the mesh: members of one name see each other", key="mesh")
    nats_url: str = setting(
        TEXT, "nats://127.0.0.1:4222", "NATS servers, comma-separated; user:password@ and tls:// work", secret=True
    )
    redis_url: str = setting(TEXT, "redis://127.0.0.1:6379/0", "Redis or Valkey server; rediss:// is TLS", secret=True)
    cluster_key_file: str | None = setting(
        auto_or(TEXT), None, "file with the key that workers prove to each other before any KV moves", shown_default="none"
    )
    log_level: str = setting(one_of("debug", "info", "warning", "error"), "info", "least severe log line that is written")
    log_format: str = setting(one_of("text", "json"), "text", "one `event key=value` line, or one JSON object, per event")

    @property
    def format(self) -> Literal["text", "json"]:
        return cast("Literal['text', 'json']", self.log_format)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """One worker: its model, its memory, its cores, its role."""

    mesh: MeshSettings
    worker_id: str | None = setting(auto_or(IDENTIFIER), None, "id of this worker; it survives restarts", shown_default="random")
    role: str = setting(one_of("prefill", "decode", "both"), "both", "phase that this worker computes", shown_default="by the service")
    model: str | None = setting(auto_or(TEXT), None, "a folder, a .gguf file or a hub name", shown_default="SmolLM2-135M-Instruct")
    served_model_name: str | None = setting(
        auto_or(TEXT), None, "name under which clients ask for the model", shown_default="the model's own"
    )
    revision: str | None = setting(auto_or(TEXT), None, "branch, tag or commit of a hub model", shown_default="the hub's default")
    load_format: str = setting(one_of("auto", "dummy"), "auto", "`dummy` makes random weights from a configuration")
    dtype: str = setting(
        one_of("auto", "float32", "bfloat16"), "auto", "type of weights and KV; auto chooses what is exact and quick here"
    )
    max_model_len: int | None = setting(auto_or(whole(1)), None, "longest prompt plus answer, in tokens", shown_default="the model's")
    max_num_seqs: int | None = setting(auto_or(whole(1, 4096)), None, "sequences computed at once", shown_default="computed")
    max_num_batched_tokens: int = setting(whole(1, 1 << 20), 256, "tokens of one step: prompt chunks and decode rows together")
    kv_cache_bytes: int | None = setting(
        auto_or(BYTES), None, "memory of the KV pool of each worker", key="kv_cache_memory", shown_default="computed",
        aliases=("--kv-cache-memory-bytes",),
    )  # fmt: skip
    block_size: int = setting(whole(1, 1024), 16, "tokens of one KV block")
    prefix_caching: bool = setting(
        SWITCH, True, "keep computed blocks for prompts with the same beginning", key="enable_prefix_caching"
    )
    threads: int | None = setting(auto_or(whole(1, 1024)), None, "compute threads", shown_default="one per core of the worker")
    cores: tuple[int, ...] | None = setting(auto_or(CORES), None, "cores to run on", shown_default="those of the process")
    host: str = setting(
        TEXT, "127.0.0.1", "address on which other workers reach this one; auto takes the one from which NATS is reached"
    )
    control_port: int = setting(PORT, 0, "port of control connections between workers; 0 takes a free one")
    status_port: int | None = setting(
        auto_or(PORT), None, "port of /metrics, /health and /readyz; 0 takes a free one", shown_default="none"
    )
    kv_tiers: tuple[str, ...] = setting(texts("shm", "ucx", "tcp"), ("shm", "ucx", "tcp"), "ways to move KV, best first")
    device: str = setting(TEXT, "cpu", "where the model computes: cpu or cuda:N")
    engine: str = setting(one_of("torch", "synthetic"), "torch", "`synthetic` makes tokens by arithmetic, in the times given below")
    synthetic_step_s: float = setting(number_of_seconds(above_zero=False), 0.005, "synthetic engine: time of a step")
    synthetic_prefill_token_s: float = setting(number_of_seconds(above_zero=False), 0.0002, "synthetic engine: added per prompt token")
    synthetic_decode_row_s: float = setting(
        number_of_seconds(above_zero=False), 0.0005, "synthetic engine: added per decoding sequence"
    )
    seed: int = setting(whole(0, 2**63 - 1), 0, "seed of the random weights of --load-format dummy")
    drain_s: float = setting(number_of_seconds(), 30.0, "longest wait for running requests when stopping")
    strict_kernels: bool = setting(SWITCH, False, "hand KV over only between equal kernel variants")

    @property
    def id(self) -> str:
        """The worker's id; `parse_worker_settings` has filled it in."""
        if self.worker_id is None:
            raise SettingsError("worker_id is not set")
        return self.worker_id

    @property
    def worker_role(self) -> Role:
        return cast("Role", self.role)

    @property
    def engine_kind(self) -> Literal["torch", "synthetic"]:
        return cast("Literal['torch', 'synthetic']", self.engine)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """One gateway: where it listens, whom it lets in, and its bounds.

    Refuses to be made for an address that others can reach without an API key, unless `insecure` says so.
    """

    mesh: MeshSettings
    gateway_id: str | None = setting(auto_or(IDENTIFIER), None, "id of this gateway", shown_default="random")
    host: str = setting(TEXT, "127.0.0.1", "address to listen on; any but loopback needs an API key")
    port: int = setting(PORT, 8000, "port to listen on; 0 takes a free one")
    api_keys: tuple[str, ...] = setting(
        texts(), (), "key that clients must send; may be repeated. A file keeps it out of the process list", key="api_key", secret=True
    )
    api_key_file: str | None = setting(auto_or(TEXT), None, "file with one API key a line, # starts a comment", shown_default="none")
    insecure: bool = setting(SWITCH, False, "listen beyond loopback without an API key")
    sse_keepalive_s: float = setting(
        number_of_seconds(), 5.0, "silence after which a stream gets its headers or a comment", key="sse_keepalive"
    )
    max_concurrent_requests: int = setting(whole(1, 1_000_000), 1024, "requests at once; more are answered 429")
    max_body_bytes: int = setting(BYTES, 8 << 20, "largest request body")
    request_timeout_s: float = setting(number_of_seconds(), 600.0, "longest life of a request", key="request_timeout")
    drain_s: float = setting(number_of_seconds(), 30.0, "longest wait for running requests when stopping")
    listen_fd: int | None = setting(
        auto_or(whole(3)), None, "inherited listening socket, used instead of host and port", shown_default="none"
    )

    def __post_init__(self) -> None:
        if not (self.api_keys or self.insecure or is_loopback(self.host)):
            raise SettingsError(
                f"host {self.host} can be reached by others and there is no API key: give --api-key-file FILE (or --api-key KEY), "
                "keep --host 127.0.0.1, or say --insecure"
            )

    @property
    def id(self) -> str:
        """The gateway's id; `parse_gateway_settings` has filled it in."""
        if self.gateway_id is None:
            raise SettingsError("gateway_id is not set")
        return self.gateway_id


def is_loopback(host: str) -> bool:
    """Whether an address stays on this machine. A name other than localhost counts as reachable."""
    bare = host.strip("[]").lower()
    if bare == "localhost":
        return True
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False


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
    from common.runtime.settings_serve import ServeSettings

    return tuple(item for group in (MeshSettings, GatewaySettings, WorkerSettings, ServeSettings) for item in settings_of(group))


@dataclass(frozen=True, slots=True, kw_only=True)
class _ConfigFlag:
    config: str | None = setting(auto_or(TEXT), None, "TOML or YAML file with settings")


_CONFIG = settings_of(_ConfigFlag)[0]
