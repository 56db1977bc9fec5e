"""What `segue serve` takes: how many workers, on which cores, and the settings it passes on to gateway and workers."""

from dataclasses import dataclass, replace

from common.policy.watchdog import process_frozen_after_s
from common.runtime.settings import GatewaySettings, MeshSettings, WorkerSettings
from common.runtime.settings_kinds import CORES, TEXT, auto_or, number_of_seconds, one_of, whole
from common.runtime.settings_planner import PlannerSettings
from common.runtime.settings_sources import setting
from common.values.errors import SettingsError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """`worker`, `gateway` and `planning` are templates: serve fills in ids, roles, cores, addresses and the brokers that it starts.

    `nats_url` and `redis_url` are None where serve starts its own servers.
    """

    worker: WorkerSettings
    gateway: GatewaySettings
    planning: PlannerSettings
    prefill: int | None = setting(auto_or(whole(0, 256)), None, "prefill workers", shown_default="1, or 0 with --both alone")
    decode: int | None = setting(auto_or(whole(0, 256)), None, "decode workers", shown_default="1, or 0 with --both alone")
    both: int = setting(whole(0, 256), 0, "colocated workers, which do both phases")
    planner: str = setting(
        one_of("on", "advise", "off"),
        "advise",
        "roles that follow the load: `on` changes them, `advise` says what it would do. Wants three workers with a role of their own",
    )
    gateways: int = setting(whole(1, 64), 1, "gateways behind the one port; each can resume the streams of the others")
    nats_url: str | None = setting(auto_or(TEXT), None, "use these NATS servers", shown_default="an own one", secret=True)
    redis_url: str | None = setting(auto_or(TEXT), None, "use this Redis or Valkey", shown_default="an own one", secret=True)
    run_dir: str | None = setting(auto_or(TEXT), None, "folder for logs, keys and sockets", shown_default="a new private one")
    cores: tuple[int, ...] | None = setting(auto_or(CORES), None, "cores to share out", shown_default="those of the process")
    freeze_s: float = setting(
        number_of_seconds(), process_frozen_after_s(), "silence after which a process counts as frozen and is killed"
    )

    def __post_init__(self) -> None:
        if not sum(self.worker_counts):
            raise SettingsError("prefill, decode and both are all 0: at least one worker is needed")

    @property
    def given_mesh(self) -> MeshSettings:
        """The mesh's settings with the servers that were named; where none was, the default, which serve replaces by its own."""
        given = {name: url for name, url in (("nats_url", self.nats_url), ("redis_url", self.redis_url)) if url is not None}
        return replace(self.worker.mesh, **given)

    @property
    def plans(self) -> bool:
        """Whether a planner is started: with fewer than three workers that have one role each there is nothing to change."""
        prefill, decode, _ = self.worker_counts
        return self.planner != "off" and prefill + decode >= 3

    @property
    def worker_counts(self) -> tuple[int, int, int]:
        """(prefill, decode, both) as they will be started."""
        usual = 0 if self.both else 1
        if self.prefill is None and self.decode is None:
            return usual, usual, self.both
        return (1 if self.prefill is None else self.prefill), (1 if self.decode is None else self.decode), self.both
