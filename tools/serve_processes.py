"""From settings to the processes of one mesh: which commands, with which files, in which order they start and stop.

Each child reads its settings from a file of mode 0600; its command line and its environment hold no secret.
"""

import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from common.runtime.core_claims import CorePlan
from common.runtime.settings import MeshSettings
from common.runtime.settings_file import to_file
from common.runtime.settings_parse import all_settings
from common.runtime.settings_serve import ServeSettings
from common.runtime.supervisor_brokers import OwnServer, own_nats, own_valkey
from common.runtime.supervisor_process import ProcessSpec
from common.runtime.supervisor_states import ChildSpec
from tools.serve_model import ServedModel

ROOT = Path(__file__).resolve().parent.parent
BROKER_STAGE, WORKER_STAGE, GATEWAY_STAGE = 0, 1, 2
STOP_SLACK_S = 5.0
"""What a process gets beyond its own drain time before it is killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """`cores` is by worker name. `own_servers` hold their ports while the mesh runs."""

    folder: Path
    processes: tuple[ProcessSpec, ...]
    own_servers: tuple[OwnServer, ...]
    cores: Mapping[str, tuple[int, ...]]


def mesh_of(
    settings: ServeSettings, model: ServedModel, cores: CorePlan, folder: Path, environ: Mapping[str, str], *, listen_fd: int
) -> Mesh:
    """Write the children's files into `folder` and describe the processes."""
    environment = child_environment(environ)
    servers: list[OwnServer] = []
    mesh = replace(settings.worker.mesh, cluster_key_file=_cluster_key(settings.worker.mesh, folder))
    if settings.nats_url is None:
        servers.append(own_nats(folder, environment, freeze_s=settings.freeze_s))
        mesh = replace(mesh, nats_url=servers[-1].url)
    else:
        mesh = replace(mesh, nats_url=settings.nats_url)
    if settings.redis_url is None:
        servers.append(own_valkey(folder, environment, freeze_s=settings.freeze_s))
        mesh = replace(mesh, redis_url=servers[-1].url)
    else:
        mesh = replace(mesh, redis_url=settings.redis_url)
    names = worker_names(settings.worker_counts)
    workers = [
        _worker(index, name, settings, model, mesh, cores.workers[index], folder, environment) for index, name in enumerate(names)
    ]
    gateways = [_gateway(name, settings, mesh, folder, environment, listen_fd) for name in gateway_names(settings.gateways)]
    planners = [_planner(settings, mesh, folder, environment)] if settings.plans else []
    return Mesh(
        folder=folder,
        processes=(*(server.process for server in servers), *workers, *planners, *gateways),
        own_servers=tuple(servers),
        cores=dict(zip(names, cores.workers, strict=True)),
    )


def worker_names(counts: tuple[int, int, int]) -> list[str]:
    """`prefill-0`, `decode-0`, …: how people call the processes; ids on the wire carry no role."""
    return [f"{role}-{index}" for role, count in zip(("prefill", "decode", "both"), counts, strict=True) for index in range(count)]


def gateway_names(count: int) -> list[str]:
    """They share one listening socket; whichever is free takes the next connection."""
    return ["gateway"] if count == 1 else [f"gateway-{index}" for index in range(count)]


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without our settings, which the children get from their files, and with the way to our code."""
    ours = {item.variable for item in all_settings()} | {"SEGUE_CONFIG", "SEGUE_NOTIFY_FD"}
    kept = {name: value for name, value in environ.items() if name not in ours}
    path = os.pathsep.join(part for part in (str(ROOT), environ.get("PYTHONPATH", "")) if part)
    return kept | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _worker(
    index: int,
    name: str,
    settings: ServeSettings,
    model: ServedModel,
    mesh: MeshSettings,
    cores: tuple[int, ...],
    folder: Path,
    environment: Mapping[str, str],
) -> ProcessSpec:
    role = name.partition("-")[0]
    worker = replace(
        model.worker,
        mesh=mesh,
        worker_id=f"worker-{index}-{secrets.token_hex(4)}",
        role=role,
        status_port=0,
        cores=cores,
        threads=model.worker.threads or len(cores),
    )
    path = folder / f"{name}.toml"
    to_file(path, mesh, worker)
    child = ChildSpec(
        name=name,
        start_stage=WORKER_STAGE,
        stop_stage=WORKER_STAGE,
        drain_s=worker.drain_s + STOP_SLACK_S,
        freeze_s=settings.freeze_s,
    )
    service = "services.prefill" if role == "prefill" else "services.decode"
    threads = {"OMP_NUM_THREADS": str(worker.threads)}
    return ProcessSpec(
        child=child,
        command=(sys.executable, "-m", service, "--config", str(path)),
        environment={**environment, **threads},
        folder=str(ROOT),
        cores=cores,
    )


def _gateway(
    name: str, settings: ServeSettings, mesh: MeshSettings, folder: Path, environment: Mapping[str, str], listen_fd: int
) -> ProcessSpec:
    gateway = replace(settings.gateway, mesh=mesh, gateway_id=f"{name}-{secrets.token_hex(4)}", listen_fd=listen_fd, api_key_file=None)
    path = folder / f"{name}.toml"
    to_file(path, mesh, gateway)
    child = ChildSpec(
        name=name,
        start_stage=WORKER_STAGE,
        stop_stage=GATEWAY_STAGE,
        drain_s=gateway.drain_s + STOP_SLACK_S,
        freeze_s=settings.freeze_s,
        loading_freeze_s=60.0,
    )
    return ProcessSpec(
        child=child,
        command=(sys.executable, "-m", "services.gateway", "--config", str(path)),
        environment=environment,
        folder=str(ROOT),
        descriptors=(listen_fd,),
    )


def _planner(settings: ServeSettings, mesh: MeshSettings, folder: Path, environment: Mapping[str, str]) -> ProcessSpec:
    planner = replace(
        settings.planning, mesh=mesh, planner=settings.planner, planner_id=f"planner-{secrets.token_hex(4)}", status_port=0
    )
    path = folder / "planner.toml"
    to_file(path, mesh, planner)
    child = ChildSpec(
        name="planner",
        start_stage=WORKER_STAGE,
        stop_stage=WORKER_STAGE,
        drain_s=STOP_SLACK_S,
        freeze_s=settings.freeze_s,
        loading_freeze_s=60.0,
    )
    return ProcessSpec(
        child=child,
        command=(sys.executable, "-m", "services.planner", "--config", str(path)),
        environment=environment,
        folder=str(ROOT),
    )


def _cluster_key(mesh: MeshSettings, folder: Path) -> str:
    """The file of the user, else a new key of our own."""
    if mesh.cluster_key_file is not None:
        return str(Path(mesh.cluster_key_file).expanduser().resolve())
    path = folder / "cluster.key"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32) + "\n", "ascii")
    return str(path)
