"""What a gateway knows of workers from their snapshots, said with literal times."""

from common.mesh.worker_registry import OWN_PAUSE_S, SILENT_AFTER_S, WorkerRegistry
from common.policy.worker_outlook import PendingLoad
from common.values.ids import Incarnation, ModelKey, WorkerId
from common.values.kv_layout import Fingerprint, KvLayout
from common.values.slo import Slo
from common.values.worker import WorkerSnapshot, WorkerState

W = WorkerId("w")


def snapshot(
    number: int, *, worker: str = "w", incarnation: str = "1", model: str = "m", state: WorkerState = "ready", running: int = 0
) -> WorkerSnapshot:
    return WorkerSnapshot(
        worker=WorkerId(worker),
        incarnation=Incarnation(incarnation),
        model=ModelKey(model, "1"),
        role="both",
        state=state,
        sequence_number=number,
        control_host="",
        control_port=0,
        fingerprint=Fingerprint(weights="w", dtype="float32", layout=KvLayout(layers=1, kv_heads=1, head_dim=1, block_size=4)),
        max_model_len=100,
        max_num_seqs=4,
        blocks_total=10,
        blocks_free=10,
        blocks_cached=0,
        running=running,
    )


def test_a_newer_snapshot_replaces_an_older_one_and_not_the_other_way() -> None:
    registry = WorkerRegistry()
    registry.observe(snapshot(2, running=2), 0.0)
    registry.observe(snapshot(1, running=1), 0.0)
    known = registry.get(W)
    assert known is not None
    assert known.running == 2


def test_a_new_incarnation_counts_from_the_start() -> None:
    registry = WorkerRegistry()
    registry.observe(snapshot(50), 0.0)
    registry.observe(snapshot(1, incarnation="2", running=1), 0.0)
    known = registry.get(W)
    assert known is not None
    assert known.running == 1


def test_a_farewell_is_obeyed_where_it_is_of_the_known_incarnation() -> None:
    registry = WorkerRegistry()
    registry.observe(snapshot(1, incarnation="2"), 0.0)
    registry.observe(snapshot(9, incarnation="1"), 0.0, gone=True)
    assert registry.get(W) is not None
    registry.observe(snapshot(2, incarnation="2"), 0.0, gone=True)
    assert registry.get(W) is None
    registry.observe(snapshot(3, incarnation="2"), 0.0, gone=True)
    assert registry.get(W) is None


def look(registry: WorkerRegistry, start: float, until: float) -> None:
    """As its gateway does, every second."""
    while start <= until:
        registry.expire(start)
        start += 1.0


def test_a_silent_worker_is_forgotten_and_known_again_once_it_is_heard() -> None:
    registry = WorkerRegistry()
    registry.expire(99.0)
    registry.observe(snapshot(1), 100.0)
    look(registry, 100.0, 100.0 + SILENT_AFTER_S)
    assert registry.get(W) is not None
    registry.expire(100.1 + SILENT_AFTER_S)
    assert registry.get(W) is None
    registry.observe(snapshot(2), 110.0)
    assert registry.get(W) is not None


def test_our_own_pause_is_nobodys_silence() -> None:
    registry = WorkerRegistry()
    registry.observe(snapshot(1), 0.0)
    registry.expire(0.0)
    registry.expire(60.0)
    assert registry.get(W) is not None
    look(registry, 60.0 + OWN_PAUSE_S, 63.0)
    registry.expire(63.1)
    assert registry.get(W) is None


def test_nobody_is_silent_while_the_broker_is_away() -> None:
    registry = WorkerRegistry()
    registry.observe(snapshot(1), 0.0)
    for second in range(10):
        registry.refresh(float(second))
        registry.expire(float(second))
    assert registry.get(W) is not None


def test_a_worker_taken_for_lost_is_unknown_until_it_is_heard() -> None:
    registry = WorkerRegistry()
    registry.observe(snapshot(1), 0.0)
    registry.dispatched(W, PendingLoad(tokens=10, sequences=1))
    registry.forget(W)
    assert registry.get(W) is None
    assert registry.silence(W, 0.4) == 0.4
    assert not registry.pending
    registry.observe(snapshot(2), 0.5)
    assert registry.silence(W, 1.0) == 0.5


def test_who_was_heard_irregularly_gets_a_longer_bound_that_fades() -> None:
    registry = WorkerRegistry()
    for now in (0.0, 0.5, 1.0):
        registry.observe(snapshot(int(10 * now)), now)
    assert registry.bounds(W, Slo()).lost_after_s == 1.0
    registry.observe(snapshot(20), 2.25)
    assert registry.bounds(W, Slo()).lost_after_s == 2.5
    for step in range(1, 100):
        registry.observe(snapshot(20 + step), 2.25 + 0.5 * step)
    assert registry.bounds(W, Slo()).lost_after_s < 1.5
    registry.observe(snapshot(1, incarnation="2"), 100.0)
    assert registry.bounds(W, Slo()).lost_after_s == 1.0


def test_a_freeze_widens_no_bound() -> None:
    registry = WorkerRegistry()
    for now in (0.0, 0.5, 1.0):
        registry.observe(snapshot(int(10 * now)), now)
    registry.forget(W)
    registry.observe(snapshot(20), 9.0)
    assert registry.bounds(W, Slo()).lost_after_s == 1.0


def test_who_was_not_heard_for_its_bound_is_named_silent_before_it_is_forgotten() -> None:
    registry = WorkerRegistry()
    registry.observe(snapshot(1), 0.0)
    assert not registry.silent(Slo(), 1.0)
    assert registry.silent(Slo(), 1.1) == {W}
    registry.heard(W, 1.2)
    assert not registry.silent(Slo(), 1.3)


def test_what_was_dispatched_is_counted_until_a_snapshot_shows_it() -> None:
    registry = WorkerRegistry()
    registry.observe(snapshot(1), 0.0)
    registry.dispatched(W, PendingLoad(tokens=10, sequences=1))
    registry.dispatched(W, PendingLoad(tokens=5, sequences=2))
    assert registry.pending[W] == PendingLoad(sequences=3, tokens=15)
    registry.observe(snapshot(2), 0.1)
    assert W not in registry.pending


def test_models_are_those_with_a_ready_worker() -> None:
    registry = WorkerRegistry()
    registry.observe(snapshot(1, worker="a", model="x"), 0.0)
    registry.observe(snapshot(1, worker="b", model="y", state="loading"), 0.0)
    registry.observe(snapshot(1, worker="c", model="y", state="draining"), 0.0)
    assert registry.models() == [ModelKey("x", "1")]
    assert [s.worker for s in registry.group(ModelKey("y", "1"))] == ["b", "c"]
    assert len(list(registry.all())) == 3
