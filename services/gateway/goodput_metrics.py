"""Goodput as metrics: how many requests were good by class, where they were placed, and how far predictions were off."""

from collections.abc import Sequence

from common.runtime.metrics import Metrics
from common.values.request_account import RequestAccount
from services.gateway.mesh_client import LiveMesh

OUTCOMES = ("good", "late", "slow", "late_and_slow", "unjudged", "refused", "cancelled", "failed")
KINDS = ("split", "colocated", "beside", "stays", "one_token", "alone")
RATIOS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 8.0, 16.0)


def show_goodput(metrics: Metrics, mesh: LiveMesh, classes: Sequence[str]) -> None:
    """`classes` are those of the settings; other gateways may know more, and are to say so of theirs."""
    core = mesh.core
    ended = metrics.counter(
        "segue_goodput_requests_total",
        "Requests by class and outcome: good met both objectives, late missed TTFT, slow missed TPOT; refused early (429).",
        ("class", "outcome"),
    )
    for name in classes:
        for outcome in OUTCOMES:
            ended.series(name, outcome).follow(lambda key=(name, outcome): core.service.ended[key])  # type: ignore[misc]
    placed = metrics.counter("segue_placements_total", "Attempts of requests by kind of placement.", ("kind",))
    for kind in KINDS:
        placed.series(kind).follow(lambda kind=kind: core.counters[f"placed_{kind}"])  # type: ignore[misc]
    late = metrics.counter("segue_best_effort_requests_total", "Requests taken though they were predicted to be late.").series()
    giving_way = metrics.counter("segue_gives_way_requests_total", "Requests of keys that had more than their share.").series()
    ttft = metrics.histogram(
        "segue_ttft_over_predicted_ratio", "TTFT that requests had, over the one predicted.", buckets=RATIOS
    ).series()
    tpot = metrics.histogram(
        "segue_tpot_over_predicted_ratio", "TPOT that requests had, over the one predicted.", buckets=RATIOS
    ).series()

    def count(account: RequestAccount) -> None:
        late.add(account.best_effort)
        giving_way.add(account.gives_way)
        had, predicted = account.had, account.predicted
        if had is None or predicted is None:
            return
        if predicted.ttft_s > 0.0:
            ttft.observe(had.ttft_s / predicted.ttft_s)
        if predicted.tpot_s > 0.0 and had.tpot_s > 0.0:
            tpot.observe(had.tpot_s / predicted.tpot_s)

    mesh.count_accounts(count)
