"""`python -m services.gateway`: wires the gateway together and serves until it is told to stop."""

import asyncio
import signal
import socket
import sys
from os import environ

import uvloop

from common.protocol.subjects import Names
from common.runtime.adapter_metrics import show_adapter_metrics
from common.runtime.broker_connections import connect_broker, connect_store
from common.runtime.failpoints import Failpoints
from common.runtime.incarnation import make_incarnation
from common.runtime.leave_process import leave_process
from common.runtime.logs import configure_logging
from common.runtime.metrics import Metrics
from common.runtime.one_error import one_error
from common.runtime.process_notify import ProcessNotifier
from common.runtime.settings import GatewaySettings
from common.runtime.settings_parse import parse_gateway_settings
from common.values.errors import SegueError, SettingsError
from common.values.ids import GatewayId
from services.gateway.goodput_metrics import show_goodput
from services.gateway.http.application import GatewayApplication
from services.gateway.http.http_settings import HttpSettings
from services.gateway.http.server import listen, serve_http
from services.gateway.mesh_client import LiveMesh
from services.gateway.mesh_metrics import show_mesh_metrics

EXIT_CANNOT_START = 2
FIRST_CARDS_S = 1.5
"""Workers announce themselves twice a second."""


def main() -> int:
    try:
        settings = parse_gateway_settings(sys.argv[1:], environ)
        configure_logging(service=settings.id, level=settings.mesh.log_level, log_format=settings.mesh.format)
        with one_error(SegueError):
            uvloop.run(run(settings))
    except SegueError as error:
        print(f"gateway: {error}", file=sys.stderr)
        return EXIT_CANNOT_START
    return 0


async def run(settings: GatewaySettings) -> None:
    notifier = ProcessNotifier.from_environment()
    notifier.state("loading")
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    listening = _socket(settings)
    broker = await connect_broker(settings.mesh, name=settings.id)
    store = await connect_store(settings.mesh)
    incarnation = make_incarnation()
    mesh = LiveMesh(
        gateway=GatewayId(f"{settings.id}-{incarnation}"),  # frames for one process must never reach the next one
        incarnation=incarnation,
        broker=broker,
        store=store,
        names=Names(settings.mesh.name),
        failpoints=Failpoints(settings.mesh.failpoints),
        slo=settings.slo,
        rules=settings.placement_rules,
    )
    metrics = Metrics()
    show_mesh_metrics(metrics, mesh)
    show_goodput(metrics, mesh, [each.name for each in settings.classes])
    show_adapter_metrics(metrics, broker=broker.counts, store=store.counts)
    http = http_settings(settings)
    try:
        async with asyncio.TaskGroup() as tasks:
            started = asyncio.Event()
            mesh_task = tasks.create_task(mesh.run(started))
            beat = tasks.create_task(notifier.heartbeat())
            await started.wait()
            await mesh.first_cards(timeout_s=FIRST_CARDS_S)
            notifier.state("ready")
            await serve_http(GatewayApplication(mesh, http, metrics), http, sockets=[listening], stop=stop)
            notifier.state("draining")
            mesh_task.cancel()
            beat.cancel()
    finally:
        await broker.close()
        await store.close()


def http_settings(settings: GatewaySettings) -> HttpSettings:
    return HttpSettings(
        host=settings.host,
        port=settings.port,
        api_keys=settings.api_keys,
        insecure=settings.insecure,
        max_body_bytes=settings.max_body_bytes,
        max_concurrent_requests=settings.max_concurrent_requests,
        sse_keepalive_s=settings.sse_keepalive_s,
        drain_timeout_s=settings.drain_s,
        request_deadline_s=settings.request_timeout_s,
        classes=settings.classes,
    )


def _socket(settings: GatewaySettings) -> socket.socket:
    if settings.listen_fd is None:
        return listen(settings.host, settings.port)
    try:
        return socket.socket(fileno=settings.listen_fd)
    except OSError as error:
        raise SettingsError(f"--listen-fd {settings.listen_fd} is not an open socket: {error}") from error


if __name__ == "__main__":
    leave_process(main())
