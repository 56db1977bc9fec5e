"""`python -m services.planner`: wires the planner together and runs it until it is told to stop."""

import asyncio
import os
import signal
import sys
from contextlib import ExitStack
from os import environ
from typing import BinaryIO

import uvloop

from common.protocol.subjects import Names
from common.runtime.adapter_metrics import show_adapter_metrics
from common.runtime.broker_connections import connect_broker, connect_store
from common.runtime.incarnation import make_incarnation
from common.runtime.leave_process import leave_process
from common.runtime.logs import configure_logging
from common.runtime.metrics import Metrics
from common.runtime.one_error import one_error
from common.runtime.process_notify import ProcessNotifier
from common.runtime.settings_parse import parse_planner_settings
from common.runtime.settings_planner import PlannerSettings
from common.runtime.status_server import StatusServer
from common.simulation.roles.role_controller import ControllerSettings
from common.values.errors import SegueError, SettingsError
from services.planner.planner_metrics import show_planner_metrics
from services.planner.planner_service import PlannerService

EXIT_CANNOT_START = 2
NICENESS = 10
"""Trials take what serving leaves."""


def main() -> int:
    try:
        settings = parse_planner_settings(sys.argv[1:], environ)
        configure_logging(service=settings.id, level=settings.mesh.log_level, log_format=settings.mesh.format)
        os.nice(NICENESS)
        with one_error(SegueError), ExitStack() as files:
            log = None if settings.decision_log is None else files.enter_context(_opened(settings.decision_log))
            uvloop.run(run(settings, log))
    except SegueError as error:
        print(f"planner: {error}", file=sys.stderr)
        return EXIT_CANNOT_START
    return 0


async def run(settings: PlannerSettings, decision_log: BinaryIO | None) -> None:
    notifier = ProcessNotifier.from_environment()
    notifier.state("loading")
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    broker = await connect_broker(settings.mesh, name=settings.id)
    store = await connect_store(settings.mesh)
    service = PlannerService(
        planner=f"{settings.id}-{make_incarnation()}",
        mode=settings.mode,
        interval_s=settings.planner_interval_s,
        broker=broker,
        store=store,
        names=Names(settings.mesh.name),
        settings=ControllerSettings(step_tokens=settings.max_num_batched_tokens),
        decision_log=decision_log,
    )
    metrics = Metrics()
    show_planner_metrics(metrics, service)
    show_adapter_metrics(metrics, broker=broker.counts, store=store.counts)
    try:
        async with (
            StatusServer(settings.host, settings.status_port, metrics, ready=lambda: service.ready),
            asyncio.TaskGroup() as tasks,
        ):
            started = asyncio.Event()
            running = tasks.create_task(service.run(started))
            beat = tasks.create_task(notifier.heartbeat())
            await started.wait()
            notifier.state("ready")
            await stop.wait()
            notifier.state("draining")
            running.cancel()
            beat.cancel()
    finally:
        await broker.close()
        await store.close()


def _opened(path: str) -> BinaryIO:
    try:
        return open(path, "ab")
    except OSError as error:
        raise SettingsError(f"--decision-log {path}: cannot be written ({error})") from error


if __name__ == "__main__":
    leave_process(main())
