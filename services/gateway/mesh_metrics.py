"""What the gateway knows of the mesh, as metrics: workers by role and state, and what its core counted."""

from common.runtime.message_refusals import REASONS
from common.runtime.metrics import Metrics
from services.gateway.mesh_client import LiveMesh

COUNTED = (
    *("probes", "unknown", "workers_lost", "stray_frames", "dispatch_full", "dispatch_stale", "adopted", "dropped", "left_unread"),
    *("suspects_announced", "requests_poisoned", "handed_back", "wrong_model"),
)


def show_mesh_metrics(metrics: Metrics, mesh: LiveMesh) -> None:
    core = mesh.core
    workers = metrics.gauge("segue_workers", "Workers heard of in the last seconds.", ("role", "state"))
    for role in ("prefill", "decode", "both"):
        for state in ("loading", "ready", "draining"):
            workers.series(role, state).follow(
                lambda role=role, state=state: sum(  # type: ignore[misc]
                    1 for snapshot in core.registry.all() if snapshot.role == role and snapshot.state == state
                )
            )
    unpaired = metrics.gauge("segue_workers_unpaired", "Workers that cannot pair with a peer they know.")
    unpaired.series().follow(lambda: sum(1 for snapshot in core.registry.all() if snapshot.unpaired))
    silence = metrics.gauge("segue_watchdog_lost_after_seconds", "Silence after which a worker is taken for lost, at most.")
    silence.series().follow(core.longest_silence_s)
    active = metrics.gauge("segue_mesh_requests", "Requests that this gateway owns in the mesh.")
    active.series().follow(lambda: core.active)
    refused = metrics.counter("segue_messages_refused_total", "Messages of the mesh that could not be taken, by reason.", ("reason",))
    for reason in REASONS:
        refused.series(reason).follow(lambda reason=reason: mesh.refusals.counts[reason])  # type: ignore[misc]
    events = metrics.counter("segue_mesh_events_total", "Probes, lost workers and refused dispatches, by kind.", ("kind",))
    for kind in COUNTED:
        events.series(kind).follow(lambda kind=kind: core.counters[kind])  # type: ignore[misc]
