"""The settings of each service: read once, at the start, into frozen dataclasses that are passed down.

Defaults < file (`--config`) < environment (`SEGUE_…`) < flags. Flags have vLLM's names where vLLM has the thing.
`settings_parse` reads them, `settings_kinds` says what a value may be, `settings_serve` is what `segue serve` adds.
"""

import ipaddress
from dataclasses import dataclass
from typing import Literal, cast

from common.policy.placement import PlacementRule
from common.policy.routing import PlacementRules
from common.runtime.settings_classes import TAKES, request_classes
from common.runtime.settings_kinds import (
    BYTES,
    CORES,
    FILE,
    IDENTIFIER,
    PORT,
    SWITCH,
    TEXT,
    auto_or,
    number_of_milliseconds,
    number_of_seconds,
    one_of,
    texts,
    whole,
)
from common.runtime.settings_sources import (
    setting,
)
from common.values.errors import SettingsError
from common.values.kv_layout import KvDtype
from common.values.request_class import RequestClass
from common.values.slo import Slo
from common.values.worker import Role

SYNTHETIC_KV_STEP_BYTES = 16
"""Of one layer and one head: K and V, each of whole 64-bit words, into which the synthetic engine writes its marks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshSettings:
    """What every member of a mesh needs: where the brokers are, the shared key, and how to log."""

    name: str = setting(IDENTIFIER, "default", "name of the mesh: members of one name see each other", key="mesh")
    nats_url: str = setting(
        TEXT,
        "nats://127.0.0.1:4222",
        "NATS servers of one cluster, comma-separated; user:password@ or token@, percent-encoded; tls:// is TLS",
        secret=True,
    )
    redis_url: str = setting(
        TEXT,
        "redis://127.0.0.1:6379/0",
        "Redis or Valkey: a primary and its replicas, comma-separated; rediss:// is TLS; "
        "or sentinels, each sentinel://host:26379/NAME-OF-THE-PRIMARY",
        secret=True,
    )
    tls_ca_file: str | None = setting(
        auto_or(FILE), None, "certificates (PEM) that tls:// and rediss:// servers must be signed by", shown_default="the system's"
    )
    tls_cert_file: str | None = setting(
        auto_or(FILE), None, "our own certificate (PEM), where a server asks for one", shown_default="none"
    )
    tls_key_file: str | None = setting(auto_or(FILE), None, "key of our own certificate", shown_default="in the certificate's file")
    nats_creds_file: str | None = setting(auto_or(FILE), None, "NATS credentials file (JWT and key)", shown_default="none")
    nats_nkey_file: str | None = setting(auto_or(FILE), None, "file with an nkey seed for NATS", shown_default="none")
    cluster_key_file: str | None = setting(
        auto_or(TEXT), None, "file with the key that workers prove to each other before any KV moves", shown_default="none"
    )
    failpoints: str | None = setting(
        auto_or(TEXT),
        None,
        "for tests: points at which this process dies or errs (common/runtime/failpoints.py)",
        shown_default="none",
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
        one_of("auto", "float32", "bfloat16"), "auto", "type of products and KV; auto takes the mesh's, and its first worker measures"
    )
    quantization: str = setting(
        one_of("auto", "none", "int8", "int4"),
        "auto",
        "weights in memory: auto keeps those of a quantised GGUF as they are, none expands them, int8 and int4 round any model's",
    )
    max_model_len: int | None = setting(auto_or(whole(1)), None, "longest prompt plus answer, in tokens", shown_default="the model's")
    max_num_seqs: int | None = setting(auto_or(whole(1, 4096)), None, "sequences computed at once", shown_default="computed")
    prefill_order: str = setting(
        one_of("feasible_first", "edf", "shortest_first", "fcfs"),
        "feasible_first",
        "which prompts are computed next: as many on time as can be; the others are baselines to compare with",
    )
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
    kernels: str = setting(
        one_of("auto", "native", "torch"), "auto", "what computes on a CPU: own kernels where they can be built, or torch alone"
    )
    synthetic_step_s: float = setting(number_of_seconds(above_zero=False), 0.005, "synthetic engine: time of a step")
    synthetic_prefill_token_s: float = setting(number_of_seconds(above_zero=False), 0.0002, "synthetic engine: added per prompt token")
    synthetic_decode_row_s: float = setting(
        number_of_seconds(above_zero=False), 0.0005, "synthetic engine: added per decoding sequence"
    )
    synthetic_kv_token_bytes: int | None = setting(
        auto_or(whole(16, 1 << 20)), None, "synthetic engine: KV bytes of a token, a multiple of 16", shown_default="the model's"
    )
    synthetic_checks: bool = setting(
        SWITCH, True, "synthetic engine: mark each sequence's KV as its own, and look for the marks before every step"
    )
    seed: int = setting(whole(0, 2**63 - 1), 0, "seed of the random weights of --load-format dummy")
    drain_s: float = setting(
        number_of_seconds(), 30.0, "longest wait for running requests when stopping", aliases=("--drain-timeout",)
    )
    strict_kernels: bool = setting(SWITCH, False, "hand KV over only between equal kernel variants")

    def __post_init__(self) -> None:
        if (self.synthetic_kv_token_bytes or 0) % SYNTHETIC_KV_STEP_BYTES:
            raise SettingsError(
                f"synthetic_kv_token_bytes {self.synthetic_kv_token_bytes} is no multiple of {SYNTHETIC_KV_STEP_BYTES}"
            )

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
    def asked_dtype(self) -> KvDtype | None:
        """None: `auto`."""
        return None if self.dtype == "auto" else cast("KvDtype", self.dtype)

    @property
    def engine_kind(self) -> Literal["torch", "synthetic"]:
        return cast("Literal['torch', 'synthetic']", self.engine)

    @property
    def kernel_choice(self) -> Literal["auto", "native", "torch"]:
        return cast("Literal['auto', 'native', 'torch']", self.kernels)

    @property
    def quantization_choice(self) -> Literal["auto", "none", "int8", "int4"]:
        return cast("Literal['auto', 'none', 'int8', 'int4']", self.quantization)


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
    drain_s: float = setting(
        number_of_seconds(), 30.0, "longest wait for running requests when stopping", aliases=("--drain-timeout",)
    )
    placement: str = setting(
        one_of("free", "split"),
        "free",
        "free: a request may stay on one worker where that is better; split: roles are strict",
    )
    placement_rule: str = setting(
        one_of("least_seconds", "power_of_two", "join_shortest_queue", "round_robin", "random"),
        "least_seconds",
        "how workers are chosen; all but the first are baselines to compare with",
    )
    slo_ttft_ms: float | None = setting(
        auto_or(number_of_milliseconds()), None, "objective of the time to the first token", shown_default="5 x unloaded"
    )
    slo_tpot_ms: float | None = setting(
        auto_or(number_of_milliseconds()), None, "objective of the time between later tokens", shown_default="3 x unloaded"
    )
    request_class: tuple[str, ...] = setting(
        texts(),
        (),
        f"{TAKES}: objectives of a class, which are also the tightest that its requests may ask for, and what becomes of one that "
        "would be late; may be repeated. `KEY class=NAME` as an API key binds it to a class",
    )
    listen_fd: int | None = setting(
        auto_or(whole(3)), None, "inherited listening socket, used instead of host and port", shown_default="none"
    )

    def __post_init__(self) -> None:
        if not (self.api_keys or self.insecure or is_loopback(self.host)):
            raise SettingsError(
                f"host {self.host} can be reached by others and there is no API key: give --api-key-file FILE (or --api-key KEY), "
                "keep --host 127.0.0.1, or say --insecure"
            )
        request_classes(self.request_class, ttft_s=None, tpot_s=None)

    @property
    def classes(self) -> tuple[RequestClass, ...]:
        return request_classes(self.request_class, ttft_s=_seconds(self.slo_ttft_ms), tpot_s=_seconds(self.slo_tpot_ms))

    @property
    def slo(self) -> Slo:
        """What bounds of silence are derived from."""
        usual = Slo()
        return Slo(ttft_s=_seconds(self.slo_ttft_ms) or usual.ttft_s, tpot_s=_seconds(self.slo_tpot_ms) or usual.tpot_s)

    @property
    def placement_rules(self) -> PlacementRules:
        return PlacementRules(rule=cast("PlacementRule", self.placement_rule), free=self.placement == "free")

    @property
    def id(self) -> str:
        """The gateway's id; `parse_gateway_settings` has filled it in."""
        if self.gateway_id is None:
            raise SettingsError("gateway_id is not set")
        return self.gateway_id


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000.0


def is_loopback(host: str) -> bool:
    """Whether an address stays on this machine. A name other than localhost counts as reachable."""
    bare = host.strip("[]").lower()
    if bare == "localhost":
        return True
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False
