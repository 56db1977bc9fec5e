"""Wires a worker together: settings to model, region, engine, brokers, peers; then serves until told to stop."""

import asyncio
import logging
import os
import secrets
import signal
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import uvloop

from common.adapters.kv_transport import build_kv_transport
from common.adapters.peer_network import TcpPeerNetwork
from common.engine.model_cache import default_cache_dir
from common.mesh.intake import WorkerLimits
from common.mesh.sequence_engine import SequenceEngine
from common.mesh.worker import WorkerCore
from common.policy.batching import StepLimits
from common.policy.block_pool import BlockPool
from common.policy.prefill_queue import PrefillOrder
from common.policy.step_time import StepTime
from common.ports.kv_transport import KvRegion
from common.protocol.subjects import Names
from common.runtime.adapter_metrics import show_adapter_metrics
from common.runtime.broker_connections import connect_broker, connect_store
from common.runtime.calibration_file import known_calibration
from common.runtime.dtype_agreement import DtypeAgreement
from common.runtime.failpoints import Failpoints
from common.runtime.incarnation import make_incarnation
from common.runtime.logs import configure_logging
from common.runtime.metrics import Metrics
from common.runtime.one_error import one_error
from common.runtime.process_notify import ProcessNotifier
from common.runtime.settings import WorkerSettings
from common.runtime.settings_parse import parse_worker_settings
from common.runtime.status_server import StatusServer
from common.runtime.warm_up import warm_up
from common.runtime.worker_calibration import calibration_subject
from common.runtime.worker_engine import (
    FoundModel,
    Progress,
    WorkerModel,
    find_model,
    prepare_model,
    quickest_dtype,
    start_step_engine,
)
from common.runtime.worker_metrics import PullObserver, show_worker_metrics
from common.runtime.worker_parts import WorkerIdentity, WorkerWorld
from common.runtime.worker_service import WorkerService
from common.values.errors import SegueError, SettingsError
from common.values.ids import ReservationId, WorkerId
from common.values.kv_layout import KvDtype
from common.values.transfer import Tier
from common.values.worker import Role

EXIT_CANNOT_START = 2
SWITCH_INTERVAL_S = 0.001
"""The step, copy and seal threads hold the interpreter briefly and often; nobody should wait 5 ms (Python's own) for a turn."""
logger = logging.getLogger(__name__)


def worker_main(argv: list[str], environ: Mapping[str, str], *, default_role: Role) -> int:
    """The main of `python -m services.prefill` and `python -m services.decode`."""
    try:
        settings = parse_worker_settings(argv, environ, default_role=default_role)
        configure_logging(service=settings.id, level=settings.mesh.log_level, log_format=settings.mesh.format)
        if settings.cores is not None:
            os.sched_setaffinity(0, settings.cores)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        with one_error(SegueError):
            uvloop.run(run_worker(settings))
        logger.info("stopped")
    except SegueError as error:
        print(f"{default_role} worker: {error}", file=sys.stderr)
        return EXIT_CANNOT_START
    return 0


async def run_worker(settings: WorkerSettings) -> None:
    notifier = ProcessNotifier.from_environment()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with asyncio.TaskGroup() as tasks:
        alive = _Liveness()
        beat = tasks.create_task(notifier.heartbeat(alive.is_alive))
        serving = tasks.create_task(_serve(settings, notifier, stop, alive))
        stopping = tasks.create_task(stop.wait())
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        await serving
        beat.cancel()


@dataclass(slots=True)
class _Liveness:
    """A worker that still loads is alive; once there is a service, that one knows."""

    service: WorkerService | None = None

    def is_alive(self) -> bool:
        return self.service is None or self.service.alive


async def _serve(settings: WorkerSettings, notifier: ProcessNotifier, stop: asyncio.Event, liveness: _Liveness) -> None:
    """What was opened last is closed first: the region's memory goes with the transport, so the engine stops before it."""

    shown = ""

    def progress(detail: str, fraction: float | None) -> None:
        nonlocal shown
        notifier.state("loading", detail=detail, progress=fraction)
        if detail != shown:
            shown = detail
            logger.info("loading", extra={"fields": {"detail": detail}})

    cluster_key = _cluster_key(settings)
    metrics = Metrics()
    async with AsyncExitStack() as closing:
        broker = await connect_broker(settings.mesh, name=settings.id)
        closing.push_async_callback(broker.close)
        store = await connect_store(settings.mesh)
        closing.push_async_callback(store.close)
        tiers = cast("tuple[Tier, ...]", settings.kv_tiers)
        transport = build_kv_transport(tiers=tiers, host=settings.host, observer=PullObserver(metrics))
        closing.push_async_callback(transport.close)
        network = TcpPeerNetwork(cluster_key, settings.host, settings.control_port)
        found = await asyncio.to_thread(find_model, settings, progress)
        agreement = DtypeAgreement(store, Names(settings.mesh.name).dtype_key(found.key))
        dtype = await _settle_dtype(settings, found, agreement, progress)
        model = await asyncio.to_thread(prepare_model, settings, found, dtype)
        region = await transport.start(model.layout, model.blocks)
        step_engine = await asyncio.to_thread(start_step_engine, settings, model, region, progress)
        closing.push_async_callback(step_engine.close)
        progress("warming up", None)
        warm = await warm_up(step_engine, model)
        world = WorkerWorld(broker=broker, store=store, network=network, transport=transport, region=region, step_engine=step_engine)
        core = _core(settings, model, region)
        core.start_from(await asyncio.to_thread(_step_time, settings, model, warm))
        service = WorkerService(
            _identity(settings, model),
            world,
            core,
            Names(settings.mesh.name),
            Failpoints(settings.mesh.failpoints),
        )
        liveness.service = service
        show_worker_metrics(metrics, service)
        show_adapter_metrics(metrics, broker=broker.counts, store=store.counts)
        status = StatusServer(settings.host, settings.status_port, metrics, ready=lambda: service.ready, alive=liveness.is_alive)
        await closing.enter_async_context(status)
        async with asyncio.TaskGroup() as tasks:
            keeping = tasks.create_task(agreement.keep(dtype), name="dtype")
            try:
                await service.run(stop, on_ready=lambda: notifier.state("ready", detail=_ready_line(service, status)))
            finally:
                keeping.cancel()


async def _settle_dtype(settings: WorkerSettings, found: FoundModel, agreement: DtypeAgreement, progress: Progress) -> KvDtype:
    """What was asked for; or, by `auto`, what the mesh computes in, which the first worker of a model measures."""
    if (asked := settings.asked_dtype) is not None:
        agreement.compare(asked, await agreement.hold(asked))
        return asked
    reason = "the mesh computes this model in it"

    async def measure() -> KvDtype:
        nonlocal reason
        progress("measuring which dtype is quickest (once on this host)", None)
        choice = await asyncio.to_thread(quickest_dtype, settings, found.folder, found.library)
        reason = choice.reason
        return choice.dtype

    dtype = await agreement.settle(measure)
    logger.info("dtype_chosen", extra={"fields": {"dtype": dtype, "reason": reason}})
    return dtype


def _ready_line(service: WorkerService, status: StatusServer) -> str:
    """Its peers with their tiers, and where its metrics are."""
    peers = ", ".join(f"{peer} over {tier}" for peer, tier in sorted(service.tiers.items())) or "no peers"
    return peers if status.url is None else f"{peers}; {status.url}/metrics"


def _identity(settings: WorkerSettings, model: WorkerModel) -> WorkerIdentity:
    return WorkerIdentity(
        worker=WorkerId(settings.id),
        incarnation=make_incarnation(),
        role=settings.worker_role,
        card=model.card,
        fingerprint=model.fingerprint,
        max_num_seqs=model.max_num_seqs,
        drain_s=settings.drain_s,
        strict_kernels=settings.strict_kernels,
    )


def _core(settings: WorkerSettings, model: WorkerModel, region: KvRegion) -> WorkerCore:
    engine = SequenceEngine(
        fingerprint=model.fingerprint,
        pool=BlockPool(region.blocks, region.generations, caching=settings.prefix_caching),
        limits=StepLimits(max_tokens=settings.max_num_batched_tokens, max_sequences=model.max_num_seqs),
        max_model_len=model.card.max_model_len,
        eos_token_ids=model.card.eos_token_ids,
        order=cast("PrefillOrder", settings.prefill_order),
    )
    return WorkerCore(
        worker=WorkerId(settings.id),
        engine=engine,
        block_size=model.layout.block_size,
        limits=WorkerLimits(max_model_len=model.card.max_model_len, vocab_size=model.card.vocab_size, model=model.card.model),
        make_reservation=lambda: ReservationId(secrets.token_bytes(16)),
        role=settings.worker_role,
    )


def _step_time(settings: WorkerSettings, model: WorkerModel, warm: StepTime) -> StepTime:
    """Blocking: what `segue calibrate` has measured of such a worker on this host, or else what the warm-up tells."""
    calibration = known_calibration(default_cache_dir(os.environ), calibration_subject(settings, model))
    logger.info("step_time", extra={"fields": {"from": "warm-up" if calibration is None else "calibration"}})
    return warm if calibration is None else calibration.step_time


def _cluster_key(settings: WorkerSettings) -> bytes:
    """The key that workers prove to each other. A worker that was given none makes one up: it can then pair with nobody."""
    path = settings.mesh.cluster_key_file
    if path is None:
        if settings.role != "both":
            raise SettingsError("a prefill or decode worker needs --cluster-key-file: the key that its peers know too")
        return secrets.token_bytes(32)
    try:
        key = Path(path).read_bytes().strip()
    except OSError as error:
        raise SettingsError(f"--cluster-key-file {path}: cannot be read ({error})") from None
    if len(key) < 16:
        raise SettingsError(f"--cluster-key-file {path}: holds {len(key)} bytes; it takes at least 16")
    return key
