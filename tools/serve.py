"""`segue serve [MODEL]`: the whole mesh on this machine with one command, and nothing left behind when it ends.

In this order, each step refusing with one clear message (exit status 2): settings, the port, the brokers named by URL, the
model, the memory; then the run folder, the cores, and the processes under the supervisor.
"""

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Mapping, Sequence

from common.runtime.core_claims import CoreClaims, CorePlan, by_preference, hardware_siblings, own_cores, plan_cores, private_folder
from common.runtime.settings_parse import parse_serve_settings
from common.runtime.settings_serve import ServeSettings
from common.runtime.supervisor_shell import SupervisorShell
from common.values.errors import SegueError, SettingsError
from common.values.ids import ModelKey
from common.values.kv_layout import KvDtype
from tools.serve_model import ServedModel, prepare_model
from tools.serve_processes import Mesh, mesh_of
from tools.serve_reachable import check_brokers, listen_for_gateway, mesh_dtype, until_ready
from tools.serve_run_dir import run_folder
from tools.serve_view import TerminalView

EXIT_REFUSED = 2


def main(arguments: Sequence[str]) -> int:
    view = TerminalView(sys.stdout)
    try:
        return serve(parse_serve_settings(arguments, os.environ), os.environ, view)
    except SegueError as error:
        print(f"segue serve: {error}", file=sys.stderr)
        return EXIT_REFUSED


def serve(settings: ServeSettings, environ: Mapping[str, str], view: TerminalView) -> int:
    """Returns the exit status once everything has ended."""
    with contextlib.ExitStack() as held:
        listener = held.enter_context(listen_for_gateway(settings.gateway.host, settings.gateway.port))
        asyncio.run(check_brokers(settings.given_mesh, nats=settings.nats_url is not None, redis=settings.redis_url is not None))
        workers = sum(settings.worker_counts)
        model = prepare_model(settings.worker, environ, workers=workers, say=view.say, ask_mesh=lambda key: _mesh_dtype(settings, key))
        view.say(f"model {model.name} from {model.source}")
        if model.dtype is not None:
            view.say(f"dtype {model.dtype}")
        if model.memory is not None:
            view.say(f"memory: {model.memory}")
        folder = held.enter_context(run_folder(settings.run_dir))
        view.say(f"logs in {folder.path / 'logs'}")
        claims = CoreClaims(private_folder("cores"))
        held.callback(claims.close)
        cores = claim_cores(settings, claims, view)
        mesh = mesh_of(settings, model, cores, folder.path, environ, listen_fd=listener.fileno())
        for server in mesh.own_servers:
            held.enter_context(server.port_holder)
        code = asyncio.run(_run(settings, model, mesh, listener, view))
        folder.keep_logs = code != 0
        if code != 0:
            view.say(f"ended with an error; the logs are kept in {folder.path / 'logs'}")
        return code


def _mesh_dtype(settings: ServeSettings, key: ModelKey) -> KvDtype | None:
    """In a store of our own nobody has settled anything yet."""
    if settings.redis_url is None:
        return None
    return asyncio.run(mesh_dtype(settings.given_mesh, key))


def claim_cores(settings: ServeSettings, claims: CoreClaims, view: TerminalView) -> CorePlan:
    """Cores for each worker, of those that this process may use and that no other serve has taken."""
    allowed = own_cores() if settings.cores is None else settings.cores
    outside = set(allowed) - set(own_cores())
    if outside:
        raise SettingsError(f"--cores names {sorted(outside)}, but this process may only run on {list(own_cores())}")
    ordered = by_preference(allowed, hardware_siblings)
    free = claims.free(ordered)
    plan = plan_cores(free or ordered, workers=sum(settings.worker_counts), threads=settings.worker.threads)
    if not free:
        view.say(f"all of the cores {list(ordered)} are taken by other meshes: sharing them, so everything will be slower")
    elif plan.shared:
        view.say(f"fewer cores ({len(free)}) than compute threads: workers share them")
    claims.keep_only(core for cores in plan.workers for core in cores)
    return plan


async def _run(settings: ServeSettings, model: ServedModel, mesh: Mesh, listener: socket.socket, view: TerminalView) -> int:
    for name, cores in mesh.cores.items():
        view.say(f"{name}: {len(cores)} compute thread{'s' if len(cores) > 1 else ''} on core {','.join(map(str, cores))}")
    address = listener.getsockname()[:2]
    view.on_stopping = listener.close
    shell = SupervisorShell(mesh.processes, logs=mesh.folder / "logs", view=view)
    async with asyncio.TaskGroup() as group:
        greeting = group.create_task(_greet(settings, model, address, view))
        code = await shell.run()
        greeting.cancel()
    return code


async def _greet(settings: ServeSettings, model: ServedModel, address: tuple[str, int], view: TerminalView) -> None:
    """Once every process is ready and the gateway sees the workers: where to go, and what to paste."""
    await view.processes_ready.wait()
    await until_ready(*address)
    view.greet(address, model=model.name, needs_key=bool(settings.gateway.api_keys))
