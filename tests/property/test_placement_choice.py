"""Laws of placement over any mesh: it names workers that are there and can do it, harms no stream beyond its slack, and depends
on nothing but what it is told."""

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from common.policy.counted_draws import CountedDraws
from common.policy.free_placement import prefill_beside
from common.policy.placement import PlacementRule
from common.policy.routing import Placement, PlacementRules, Turn, place
from common.policy.site_questions import PlacedRequest
from common.policy.worker_outlook import STEP_TOKENS, PendingLoad, WorkerOutlook, outlook_of
from common.values.ids import Incarnation, ModelKey, WorkerId
from common.values.kv_layout import Fingerprint, KvLayout
from common.values.step_coefficients import StepCoefficients
from common.values.worker import Role, WorkerSnapshot

COEFFICIENTS = StepCoefficients(
    prefill_base_s=0.01,
    prefill_per_token_s=1e-4,
    prefill_per_pair_s=1e-8,
    decode_base_s=0.01,
    decode_per_kv_token_s=1e-6,
    decode_per_sequence_s=1e-3,
)
NAMES = ("a", "b", "c", "d", "e")
RULES: list[PlacementRule] = ["least_seconds", "power_of_two", "join_shortest_queue", "round_robin", "random"]
requests = st.builds(
    PlacedRequest,
    prompt_tokens=st.integers(1, 2000),
    output_tokens=st.floats(1.0, 500.0),
    ttft_s=st.floats(0.0, 5.0),
    tpot_s=st.floats(0.001, 0.5),
)


@st.composite
def outlooks(draw: st.DrawFn) -> list[WorkerOutlook]:
    found = []
    for name in draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=5)):
        decoding = draw(st.integers(0, 6))
        loads: dict[str, Any] = {
            "prefill_queue_s": draw(st.floats(0.0, 3.0)),
            "decoding": decoding,
            "decoding_kv_tokens": 300 * decoding,
            "stream_slack_s": draw(st.floats(-1.0, 3.0)) if decoding else None,
            "reserved_tokens_free": draw(st.integers(0, 4000)),
            "state": draw(st.sampled_from(["ready", "ready", "draining"])),
            "peers": dict.fromkeys(draw(st.sets(st.sampled_from(NAMES))), "shm"),
        }
        snapshot = worker(name, draw(st.sampled_from(["prefill", "decode", "both"])), **loads)
        found.append(outlook_of(snapshot, PendingLoad(sequences=draw(st.integers(0, 2))), draw(st.integers(0, 500))))
    return found


def worker(name: str, role: Role, **changes: Any) -> WorkerSnapshot:
    snapshot = WorkerSnapshot(
        worker=WorkerId(name),
        incarnation=Incarnation("i"),
        model=ModelKey("m", "1"),
        role=role,
        state="ready",
        sequence_number=1,
        control_host="127.0.0.1",
        control_port=1,
        fingerprint=Fingerprint(weights="w", dtype="float32", layout=KvLayout(layers=1, kv_heads=1, head_dim=1)),
        max_model_len=4096,
        max_num_seqs=8,
        blocks_total=256,
        blocks_free=256,
        blocks_cached=0,
        peers=dict.fromkeys(NAMES, "shm"),
        step_time=COEFFICIENTS,
        transfer_base_s=0.005,
    )
    return replace(snapshot, **changes)


def chosen(
    workers: list[WorkerOutlook], request: PlacedRequest, *, free: bool, needs: bool = True, rule: PlacementRule = "least_seconds"
) -> Placement | None:
    turn = Turn(number=3, draws=CountedDraws(1))
    return place(workers, request, turn, needs_decode=needs, rules=PlacementRules(rule=rule, free=free))


@given(outlooks(), requests, st.booleans(), st.booleans(), st.sampled_from(RULES))
def test_a_placement_can_be_done(
    workers: list[WorkerOutlook], request: PlacedRequest, free: bool, needs: bool, rule: PlacementRule
) -> None:
    placement = chosen(workers, request, free=free, needs=needs, rule=rule)
    ready = {o.worker: o.snapshot for o in workers if o.snapshot.state == "ready"}
    assert (placement is None) == (not ready)
    assert placement == chosen(workers[::-1], request, free=free, needs=needs, rule=rule)
    if placement is None:
        return
    assert placement.worker in ready
    if placement.decode is not None:
        assert needs
        assert ready[placement.decode].role == "decode"
        assert ready[placement.worker].role == "prefill"
        assert placement.decode in ready[placement.worker].peers
    assert (placement.kind in ("split", "beside", "stays")) <= needs
    if not free:
        assert placement.kind not in ("beside", "stays")


@st.composite
def busy_pairs(draw: st.DrawFn) -> list[WorkerOutlook]:
    """A prefill worker with a queue and a decode worker that may have little room or slack."""
    decoding = draw(st.integers(0, 6))
    decode = {
        "decoding": decoding,
        "decoding_kv_tokens": 300 * decoding,
        "stream_slack_s": draw(st.sampled_from([0.0, 0.1, 0.5, 5.0])) if decoding else None,
        "reserved_tokens_free": draw(st.sampled_from([0, 200, 1000, 8000])),
        "prefill_queue_s": draw(st.sampled_from([0.0, 0.0, 0.05])),
    }
    prefill = {"prefill_queue_s": draw(st.sampled_from([0.0, 0.5, 3.0])), "reserved_tokens_free": draw(st.integers(0, 4000))}
    shapes = (worker("a", "prefill", **prefill), worker("b", "decode", **decode))
    return [outlook_of(shape, PendingLoad(), draw(st.sampled_from([0, 64]))) for shape in shapes]


@settings(max_examples=400)
@given(busy_pairs(), requests)
def test_going_beside_streams_is_sooner_and_no_stream_misses_its_objective_for_it(
    workers: list[WorkerOutlook], request: PlacedRequest
) -> None:
    free, strict = chosen(workers, request, free=True), chosen(workers, request, free=False)
    if free is None or strict is None or free.kind == strict.kind:
        return
    assert strict.kind == "split"
    if free.kind == "beside":
        assert free.worker == strict.decode
        assert free.prompt_s < strict.prompt_s + strict.transfer_s
        known = min(free.stream.cached, request.prompt_tokens - 1)
        uncached = request.prompt_tokens - known
        beside = prefill_beside(free.stream.time, free.stream.load, tokens=uncached, past=known, step_tokens=STEP_TOKENS)
        assert beside.damage_s <= free.stream.load.slack_s
        assert request.prompt_tokens + request.output_tokens <= free.stream.room_tokens
    else:
        assert (free.kind, free.worker) == ("stays", strict.worker)
        assert strict.stream_s + strict.transfer_s / request.output_tokens > request.tpot_s, "the decode side keeps its objective"
        assert request.prompt_tokens + request.output_tokens <= free.prompt.room_tokens


@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 500))
def test_a_burst_that_no_snapshot_shows_yet_is_spread(workers: int, burst: int, tokens: int) -> None:
    """Equal requests to equal workers: none gets two more than another."""
    request = PlacedRequest(prompt_tokens=tokens, output_tokens=10.0, ttft_s=1.0, tpot_s=0.1)
    pending = dict.fromkeys(NAMES[:workers], PendingLoad())
    for _ in range(burst):
        placement = chosen([outlook_of(worker(name, "both"), pending[name], 0) for name in pending], request, free=True)
        assert placement is not None
        pending[placement.worker] += PendingLoad(sequences=1, tokens=tokens, context_tokens=tokens)
    counts = [load.sequences for load in pending.values()]
    assert max(counts) - min(counts) <= 1
