"""Where a request goes."""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from common.policy.placement import PlacementRule
from common.policy.routing import Placement, PlacementRules, Turn, place
from common.policy.site_questions import PlacedRequest
from common.policy.worker_outlook import PendingLoad, outlook_of
from common.values.ids import Incarnation, ModelKey, WorkerId
from common.values.kv_layout import Fingerprint, KvLayout
from common.values.step_coefficients import StepCoefficients
from common.values.worker import WorkerSnapshot

REQUEST = PlacedRequest(prompt_tokens=100, output_tokens=10.0, ttft_s=1.0, tpot_s=0.05)


def snapshot(name: str, role: str, **changes: Any) -> WorkerSnapshot:
    fields: dict[str, Any] = {
        "worker": WorkerId(name),
        "incarnation": Incarnation("i"),
        "model": ModelKey("m", "1"),
        "role": role,
        "state": "ready",
        "sequence_number": 1,
        "control_host": "127.0.0.1",
        "control_port": 1,
        "fingerprint": Fingerprint(weights="w", dtype="float32", layout=KvLayout(layers=1, kv_heads=1, head_dim=1)),
        "max_model_len": 100,
        "max_num_seqs": 4,
        "blocks_total": 10,
        "blocks_free": 10,
        "blocks_cached": 0,
        "peers": {other: "shm" for other in ("p", "q", "d", "e") if other != name},
    }
    return WorkerSnapshot(**(fields | changes))


def where(
    *snapshots: WorkerSnapshot,
    pending: Mapping[WorkerId, PendingLoad] | None = None,
    needs_decode: bool = True,
    avoid: tuple[str, ...] = (),
    cached: dict[str, int] | None = None,
    free: bool = False,
    prompts_asked: float = 0.0,
) -> tuple[str, str | None] | None:
    placement = placed(
        snapshots, pending, needs_decode=needs_decode, avoid=avoid, cached=cached, free=free, prompts_asked=prompts_asked
    )
    return None if placement is None else (placement.worker, placement.decode)


def placed(
    snapshots: Sequence[WorkerSnapshot],
    pending: Mapping[WorkerId, PendingLoad] | None = None,
    *,
    needs_decode: bool = True,
    avoid: tuple[str, ...] = (),
    cached: dict[str, int] | None = None,
    free: bool = False,
    prompts_asked: float = 0.0,
    rule: PlacementRule = "least_seconds",
    turn: int = 0,
    request: PlacedRequest = REQUEST,
) -> Placement | None:
    known, held = pending or {}, cached or {}
    return place(
        [outlook_of(s, known.get(s.worker, PendingLoad()), held.get(s.worker, 0)) for s in snapshots],
        request,
        Turn(number=turn, draws=Random(turn)),
        needs_decode=needs_decode,
        rules=PlacementRules(rule=rule, free=free),
        avoid=[WorkerId(name) for name in avoid],
        prompts_asked=prompts_asked,
    )


P, Q, D, E, B = (snapshot(name, role) for name, role in zip("pqdeb", ("prefill", "prefill", "decode", "decode", "both"), strict=True))


def test_prefill_and_decode_workers_are_paired() -> None:
    assert where(P, D) == ("p", "d")


def test_what_ends_with_its_first_token_stays_where_it_is_prefilled() -> None:
    assert where(P, D, needs_decode=False) == ("p", None)


def test_a_role_that_nobody_plays_is_taken_by_any_live_worker() -> None:
    assert where(P) == ("p", None)
    assert where(D) == ("d", None)
    assert where() is None
    assert where(snapshot("p", "prefill", state="loading"), snapshot("d", "decode", state="draining")) is None


def test_workers_that_cannot_pair_are_not_paired() -> None:
    assert where(snapshot("p", "prefill", peers={"e": "tcp"}), D, E) == ("p", "e")
    assert where(snapshot("p", "prefill", peers={}), D) in {("p", None), ("d", None)}


def test_the_less_loaded_is_taken() -> None:
    assert where(snapshot("p", "prefill", queued_tokens=1000), Q, D) == ("q", "d")
    assert where(P, snapshot("d", "decode", running=3), E) == ("p", "e")
    assert where(P, snapshot("d", "decode", running=1, blocks_free=0), snapshot("e", "decode", running=3)) == ("p", "e")
    assert where(P, D, B) == ("b", None)
    assert where(P, D, snapshot("b", "both", queued_tokens=1000)) == ("p", "d")


def test_of_workers_whose_steps_were_measured_nearly_alike_the_one_with_fewer_requests_is_taken() -> None:
    def measured(name: str, role: str, slower: float, **changes: Any) -> WorkerSnapshot:
        time = StepCoefficients(
            prefill_base_s=0.01 * slower, prefill_per_token_s=1e-4 * slower, prefill_per_pair_s=0.0,
            decode_base_s=0.01 * slower, decode_per_kv_token_s=0.0, decode_per_sequence_s=0.0,
        )  # fmt: skip
        return snapshot(name, role, step_time=time, **changes)

    busy = {"running": 3, "decoding": 3}
    assert where(P, measured("d", "decode", 1.0, **busy), measured("e", "decode", 1.04)) == ("p", "e")
    assert where(P, measured("d", "decode", 1.0, **busy), measured("e", "decode", 1.2)) == ("p", "d")
    assert where(measured("p", "prefill", 1.0, running=2), measured("q", "prefill", 1.04), D) == ("q", "d")


def test_a_burst_between_two_snapshots_is_spread() -> None:
    pending: dict[WorkerId, PendingLoad] = {}
    taken = []
    for _ in range(4):
        placement = placed([P, Q, D, E], pending)
        assert isinstance(placement, Placement)
        assert placement.decode is not None
        taken.append((placement.worker, placement.decode))
        pending[placement.worker] = pending.get(placement.worker, PendingLoad()) + PendingLoad(tokens=100)
        pending[placement.decode] = pending.get(placement.decode, PendingLoad()) + PendingLoad(sequences=1)
    assert sorted(taken) == [("p", "d"), ("p", "d"), ("q", "e"), ("q", "e")]


def test_of_equals_the_one_with_the_longest_cached_prefix_is_taken() -> None:
    assert where(P, Q, D, E) == ("p", "d")
    assert where(P, Q, D, E, cached={"q": 16, "e": 16}) == ("q", "e")
    assert where(P, Q, D, E, cached={"p": 16, "q": 32, "d": 48, "e": 64}) == ("q", "e")
    assert where(P, Q, cached={"q": 16}, needs_decode=False) == ("q", None)


def test_a_cached_prefix_is_worth_the_tokens_that_it_saves_and_no_more() -> None:
    assert where(P, snapshot("q", "prefill", queued_tokens=50), D, cached={"q": 64}) == ("q", "d")
    assert where(P, snapshot("q", "prefill", queued_tokens=80), D, cached={"q": 64}) == ("p", "d")
    assert where(P, D, snapshot("e", "decode", running=1), cached={"e": 96}) == ("p", "d"), "a decode worker's load comes first"


def test_who_refused_is_avoided_while_there_are_others() -> None:
    assert where(P, Q, D, avoid=("p",)) == ("q", "d")
    assert where(P, D, avoid=("p", "d")) == ("p", "d")


@given(
    st.lists(st.tuples(st.sampled_from("pqdeb"), st.integers(0, 500), st.integers(0, 5)), unique_by=lambda t: t[0]),
    st.booleans(),
    st.booleans(),
)
def test_a_placement_names_live_workers_that_fit_their_roles_in_any_order(
    workers: list[tuple[str, int, int]], needs: bool, free: bool
) -> None:
    roles = {"p": "prefill", "q": "prefill", "d": "decode", "e": "decode", "b": "both"}
    snapshots = [snapshot(name, roles[name], queued_tokens=queued, running=running) for name, queued, running in workers]
    placement = placed(snapshots, needs_decode=needs, free=free)
    assert placement == placed(snapshots[::-1], needs_decode=needs, free=free)
    assert (placement is None) == (not workers)
    if placement is not None:
        names = {name for name, _, _ in workers}
        assert placement.worker in names
        assert placement.decode is None or (needs and placement.decode in names and roles[placement.decode] == "decode")
