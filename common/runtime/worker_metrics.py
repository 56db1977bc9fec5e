"""A worker's metrics: its queue, its blocks, its steps, its hand-offs."""

from collections.abc import Callable

from common.adapters.kv_copying import TransferRecord
from common.mesh.engine_values import EngineLoad
from common.policy.step_time import StepTime
from common.runtime.message_refusals import REASONS
from common.runtime.metrics import Metrics
from common.runtime.worker_service import WorkerService

SETTLEMENTS = ("moved", "kept", "dropped", "running", "released")
PULL_OUTCOMES = ("copied", "generation", "checksum", "refused", "lost", "missing", "range")
VERDICTS = ("accepted", "full", "stale", "refused")
ENDINGS = ("stop", "length", "error", "cancelled", "handed_back", "deadline", "owner_lost")
REFUSALS = ("stale", "full", "draining", "never_fits", "mismatch")
_LOADS = {
    "segue_sequences_waiting": ("Sequences without blocks.", lambda load: load.waiting),
    "segue_sequences_running": ("Sequences that take part in steps.", lambda load: load.running),
    "segue_sequences_held": ("Sequences between prompt and hand-off, or landing.", lambda load: load.held),
    "segue_queued_tokens": ("Positions still to compute for prompts.", lambda load: load.queued_tokens),
    "segue_kv_blocks_free": ("Free blocks.", lambda load: load.blocks_free),
    "segue_kv_blocks_cached": ("Blocks that only the prefix cache holds.", lambda load: load.blocks_cached),
    "segue_kv_blocks_leased": ("Blocks of sequences between two workers.", lambda load: load.blocks_leased),
    "segue_kv_blocks": ("All blocks.", lambda load: load.blocks_total),
}


class PullObserver:
    """Times of pulls, by tier. Called on the event loop after each pull."""

    def __init__(self, metrics: Metrics) -> None:
        self._total = metrics.histogram("segue_kv_pull_seconds", "A pull from request to verified blocks.", ("tier",))
        self._copy = metrics.counter("segue_kv_copy_seconds_total", "Time of the copies alone.", ("tier",))
        self._checksum = metrics.counter("segue_kv_checksum_seconds_total", "Time of the checksums alone.", ("tier",))
        self._bytes = metrics.counter("segue_kv_pulled_bytes_total", "Bytes of blocks that were copied.", ("tier",))

    def __call__(self, record: TransferRecord) -> None:
        self._total.series(record.tier).observe(record.total_s)
        self._copy.series(record.tier).add(record.copy_s)
        self._checksum.series(record.tier).add(record.checksum_s)
        self._bytes.series(record.tier).add(record.bytes_moved)


_STEP_TIMES: dict[str, Callable[[StepTime], float]] = {
    "prefill_base": lambda time: time.prefill.base_s,
    "prefill_token": lambda time: time.prefill.per_token_s,
    "prefill_pair": lambda time: time.prefill.per_pair_s,
    "decode_base": lambda time: time.decode.line.base_s,
    "decode_kv_token": lambda time: time.decode.line.per_kv_token_s,
    "decode_sequence": lambda time: time.decode.line.per_sequence_s,
}


def show_worker_metrics(metrics: Metrics, service: WorkerService) -> None:
    core, meter = service.core, service.meter
    exposed = metrics.histogram("segue_handoff_exposed_seconds", "From first token to the receiver's ACK: transfer not hidden.")
    service.on_handoff = exposed.series().observe
    for name, (help_text, read) in _LOADS.items():
        metrics.gauge(name, help_text).series().follow(lambda read=read: float(read(core.load())))  # type: ignore[misc]

    def total(name: str, help_text: str, read: Callable[[], float]) -> None:
        metrics.counter(name, help_text).series().follow(read)

    def load() -> EngineLoad:
        return core.load()

    total("segue_tokens_total", "New tokens made here.", lambda: core.counters.tokens)
    total("segue_computed_tokens_total", "Positions computed here.", lambda: load().computed_tokens)
    total("segue_prefix_hit_tokens_total", "Positions found in the prefix cache.", lambda: load().prefix_hit_tokens)
    total("segue_preemptions_total", "Sequences stopped for lack of blocks.", lambda: load().preemptions)
    for name, help_text, kinds, counter in (
        ("segue_dispatches_total", "Dispatches by verdict.", VERDICTS, core.counters.dispatched),
        ("segue_sequences_ended_total", "Sequences that ended here, by reason.", ENDINGS, core.counters.ended),
        ("segue_handoffs_total", "Hand-offs by how they ended here.", SETTLEMENTS, core.desk.counters.settled),
        ("segue_handoff_refusals_total", "Offers that a peer refused, by reason.", REFUSALS, core.desk.counters.refused),
        (
            "segue_offers_turned_away_total",
            "Offers refused here, by reason.",
            REFUSALS,
            core.desk.counters.turned_away,
        ),
        ("segue_kv_blocks_pulled_total", "Blocks pulled from peers, by outcome.", PULL_OUTCOMES, core.desk.counters.blocks),
    ):
        family = metrics.counter(name, help_text, ("kind",))
        for kind in kinds:
            family.series(kind).follow(lambda counter=counter, kind=kind: counter[kind])  # type: ignore[misc]
    family = metrics.counter("segue_token_log_total", "The token log in the store: entries, tokens, errors, restarts.", ("kind",))
    for kind in ("entries", "tokens", "errors", "restarts"):
        family.series(kind).follow(lambda kind=kind: service.token_log.counts[kind])  # type: ignore[misc]
    leases = metrics.gauge("segue_leases", "What is held for peers: zero when the mesh is quiet.", ("kind",))
    for kind in ("offers", "reservations", "queued", "seals", "pulls"):
        leases.series(kind).follow(lambda kind=kind: float(getattr(core.leases(), kind)))  # type: ignore[misc]
    metrics.gauge("segue_peers", "Workers that KV can be moved to or from.").series().follow(lambda: len(service.tiers))
    messages = metrics.counter("segue_messages_refused_total", "Messages of the mesh that could not be taken, by reason.", ("reason",))
    for reason in REASONS:
        messages.series(reason).follow(lambda reason=reason: service.refusals.counts[reason])  # type: ignore[misc]
    metrics.gauge("segue_step_seconds", "Moving average of a decode step.").series().follow(lambda: meter.seconds_per_step)
    metrics.counter("segue_steps_refused_total", "Steps that the step-time model did not believe.").series().follow(
        lambda: core.steps_refused
    )
    times = metrics.gauge("segue_step_time_seconds", "Coefficients of the step-time model, as refitted while serving.", ("part",))
    for part, of in _STEP_TIMES.items():
        times.series(part).follow(lambda of=of: 0.0 if core.step_time is None else of(core.step_time))  # type: ignore[misc]
    metrics.gauge("segue_prefill_token_seconds", "Moving average per prompt token.").series().follow(
        lambda: meter.seconds_per_prefill_token
    )
