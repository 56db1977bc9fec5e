"""Parts of `segue bench` that know no clock: classes, traces, verdicts, the knee, prompts, answers, results, with literal cases."""

import json
import random
from pathlib import Path

import pytest

from common.simulation.goodput.flight import Arrival
from tools.bench_load.answer_reader import AnswerReader
from tools.bench_load.arrivals import Constant, Gamma, Poisson, open_loop, parse_arrivals, real_rate, replay
from tools.bench_load.bench_refused import BenchRefused
from tools.bench_load.endpoint import parse_endpoint
from tools.bench_load.export import report_json, request_lines
from tools.bench_load.figures import report_of
from tools.bench_load.goodput import attainment, attainment_by_class, fluidity, goodput_per_s, is_good
from tools.bench_load.html_report import as_html
from tools.bench_load.knee import RatePoint, find_knee, next_rate
from tools.bench_load.point_run import Progress
from tools.bench_load.predictions import parse_predictions
from tools.bench_load.progress import WIDTH, progress_line
from tools.bench_load.prompts import WORDS, learn_words, parse_vocabulary
from tools.bench_load.quantiles import quantile, summarise, wilson
from tools.bench_load.request_class import KNOWN, MIX, Objective, parse_class, parse_mix, parse_objectives, parse_toml
from tools.bench_load.request_result import RequestResult
from tools.bench_load.results_file import Point, PointKey, ResultsFile
from tools.bench_load.stages import STAGES, stages_of, summarise_stages
from tools.bench_load.text_report import as_text
from tools.bench_load_options import read_options

OBJECTIVES = {"W1": Objective(ttft_s=1.0, tpot_s=0.1)}


def a_result(number: int = 0, *, first: float = 0.5, gap: float = 0.05, tokens: int = 5, **changed: object) -> RequestResult:
    arrivals = tuple(first + gap * token for token in range(tokens))
    given: dict[str, object] = {
        "number": number,
        "kind": "W1",
        "measured": True,
        "scheduled_s": 0.0,
        "sent_s": 0.001,
        "ended_s": arrivals[-1] if arrivals else 1.0,
        "arrivals_s": arrivals,
        "planned_prompt_tokens": 256,
        "planned_output_tokens": tokens,
        "prompt_tokens": 256,
        "output_tokens": tokens,
        **changed,
    }
    return RequestResult(**given)  # type: ignore[arg-type]


def a_point(results: tuple[RequestResult, ...], rate: float | None = 1.0, seed: int = 7) -> Point:
    key = PointKey(
        cpu="a cpu",
        commit="abc",
        label="here",
        model="m",
        api="chat",
        workload="W1",
        arrivals="poisson",
        rate=rate,
        seed=seed,
        requests=len(results),
        warmup=0,
    )
    return Point(key=key, started_at=0.0, real_rate=rate, results=results)


# ---------------------------------------------------------------------------------------- classes and options


def test_classes_mixes_and_objectives_as_they_are_written() -> None:
    own = parse_class("chat:10:20:3")
    assert (own.name, own.prompt_tokens, own.output_tokens, own.share) == ("chat", 10, 20, 3.0)
    mix = parse_mix("chat,W1:5", [own])
    assert [(one.name, one.share) for one in mix] == [("chat", 3.0), ("W1", 5.0)]
    assert [one.share for one in parse_mix(MIX)] == [50, 20, 30]
    assert parse_objectives("W1:0.93:0.077")["W1"] == Objective(ttft_s=0.93, tpot_s=0.077)
    workload = parse_toml("[classes.a]\nprompt_tokens=3\noutput_tokens=4\nttft_s=1\ntpot_s=0.1\n")
    assert workload.classes[0].prompt_tokens == 3
    assert workload.objectives["a"].tpot_s == 0.1


@pytest.mark.parametrize("text", ["W9", "W1,W1", "W1:many", "W1:-1", ""])
def test_a_mix_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(BenchRefused):
        parse_mix(text)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rates", "0"],
        ["--rates", "fast"],
        ["--closed", "2", "--rates", "1"],
        ["--closed", "0"],
        ["--api", "chat", "--prompt", "ids"],
        ["--arrivals", "gamma"],
        ["--slo", "W7:1:1"],
        ["--body", "[1]"],
        ["--endpoint", "ftp://x"],
        ["--target", "1.5"],
        ["--class", "a:b:c"],
    ],
)
def test_what_cannot_be_measured_is_refused_with_a_sentence(arguments: list[str]) -> None:
    with pytest.raises(BenchRefused) as refused:
        read_options(arguments)
    assert len(str(refused.value)) > 15


def test_own_classes_are_the_mix_where_none_is_named() -> None:
    options = read_options(["--class", "a:3:4", "--slo", "a:1:1", "--seeds", "1,2", "--endpoint", "127.0.0.1:9/v1"])
    assert [one.name for one in options.classes] == ["a"]
    assert options.sweep.seeds == (1, 2)
    assert (options.endpoint.host, options.endpoint.port, options.endpoint.prefix) == ("127.0.0.1", 9, "")


def test_a_key_never_shows() -> None:
    endpoint = parse_endpoint("http://h:1", api="chat", model="m", api_key="secret", extra={"top_k": 1})
    assert "secret" not in repr(endpoint)
    request = endpoint.ask("hello", 4)
    head, _, body = request.partition(b"\r\n\r\n")
    assert b"Bearer secret" in head
    assert json.loads(body)["top_k"] == 1
    assert f"Content-Length: {len(body)}".encode() in head


# ---------------------------------------------------------------------------------------- schedules and traces


def test_a_schedule_is_drawn_classes_first_then_gaps() -> None:
    """The documented order: `random.Random(seed)` draws all classes, then the gaps."""
    planned = open_loop(parse_mix(MIX), Poisson(), rate=2.0, count=5, warmup=0, seed=7)
    rng = random.Random(7)
    kinds = rng.choices(["W1", "W2", "W3"], [50, 20, 30], k=5)
    at, times = 0.0, []
    for _ in kinds:
        times.append(at)
        at += rng.expovariate(2.0)
    assert [one.kind for one in planned] == kinds
    assert [one.at_s for one in planned] == times


def test_warm_up_comes_before_and_changes_nothing_of_the_rest() -> None:
    plain = open_loop([KNOWN["W1"]], Poisson(), rate=2.0, count=9, warmup=0, seed=3)
    warmed = open_loop([KNOWN["W1"]], Poisson(), rate=2.0, count=9, warmup=4, seed=3)
    assert [one.measured for one in warmed] == [False] * 4 + [True] * 9
    shift = warmed[4].at_s or 0.0
    assert shift > 0.0
    assert [round((one.at_s or 0.0) - shift, 9) for one in warmed[4:]] == [round(one.at_s or 0.0, 9) for one in plain]


def test_arrivals_by_name() -> None:
    assert parse_arrivals("gamma:2.5") == Gamma(2.5)
    assert [str(parse_arrivals(text)) for text in ("poisson", "constant", "gamma:2.5")] == ["poisson", "constant", "gamma:2.5"]
    steady = open_loop([KNOWN["W3"]], Constant(), rate=4.0, count=5, warmup=0, seed=1)
    assert [one.at_s for one in steady] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert real_rate(steady) == 4.0


def test_a_trace_is_sent_as_it_stands_behind_its_warm_up() -> None:
    trace = [Arrival(arrived_s=at, prompt_tokens=100, output_tokens=9) for at in (0.0, 0.5)]
    planned = replay(trace, kind="trace", warmup=1)
    assert [(one.at_s, one.prompt_tokens, one.output_tokens, one.measured) for one in planned] == [
        (0.0, 100, 9, False),
        (0.5, 100, 9, True),
    ]


# ---------------------------------------------------------------------------------------- verdicts


def test_a_request_is_good_only_if_both_objectives_hold() -> None:
    objective = OBJECTIVES["W1"]
    assert is_good(a_result(), objective)
    assert not is_good(a_result(first=1.1), objective)
    assert not is_good(a_result(gap=0.11), objective)
    assert not is_good(a_result(error="status 500"), objective)
    assert not is_good(a_result(tokens=0), objective)


def test_latencies_count_from_the_scheduled_send() -> None:
    late = a_result(first=5.0, scheduled_s=3.0, sent_s=4.9)
    assert late.ttft_s == pytest.approx(2.0)
    assert late.lag_s == pytest.approx(1.9)
    assert late.latency_s == pytest.approx(2.2)
    assert sum(late.gaps_s) == pytest.approx(late.arrivals_s[-1] - late.arrivals_s[0])
    assert late.tpot_s == pytest.approx(0.05)


def test_attainment_counts_misses_and_leaves_warm_up_out() -> None:
    results = [
        a_result(0, measured=False, first=9.0),
        a_result(1),
        a_result(2, first=1.5),
        a_result(3, gap=0.2),
        a_result(4, error="gone"),
        a_result(5, kind="other"),
    ]
    judged = attainment(results, OBJECTIVES)
    assert (judged.requests, judged.ttft_good, judged.tpot_good, judged.good) == (4, 2, 2, 1)
    assert list(attainment_by_class(results, OBJECTIVES)) == ["W1"]
    assert goodput_per_s(results, OBJECTIVES) == pytest.approx(1 / 1.7)


def test_fluidity_gives_slack_to_the_early_and_restarts_after_the_late() -> None:
    objective = Objective(ttft_s=1.0, tpot_s=0.1)
    assert fluidity(a_result(first=0.2, arrivals_s=(0.2, 0.3, 1.2), output_tokens=3), objective) == 1.0
    late_once = a_result(arrivals_s=(0.9, 1.5, 1.59, 1.69), output_tokens=4)
    assert fluidity(late_once, objective) == 0.75
    assert fluidity(a_result(error="x"), objective) == 0.0


def test_quantiles_and_wilsons_interval_against_known_values() -> None:
    assert quantile([1.0, 2.0, 4.0], 0.5) == 2.0
    assert quantile([1.0, 2.0, 4.0], 0.75) == 3.0
    summary = summarise([3.0, 1.0, 2.0])
    assert summary is not None
    assert (summary.mean, summary.deviation, summary.low, summary.high) == (2.0, 1.0, 1.0, 3.0)
    assert summarise([]) is None
    interval = wilson(90, 100)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.8256, 0.9448)
    assert wilson(0, 10).low == 0.0
    assert wilson(10, 10).high == 1.0


# ---------------------------------------------------------------------------------------- the knee


def test_the_knee_lies_between_the_last_good_rate_and_the_first_bad() -> None:
    points = [RatePoint(rate=rate, real_rate=rate, good=good, total=100) for rate, good in ((1.0, 100), (2.0, 94), (4.0, 82))]
    knee = find_knee(points, 0.9, random.Random(1))
    assert knee is not None
    assert not knee.is_bound
    assert knee.rate == pytest.approx(2.0 + 2.0 * 4 / 12)
    assert knee.interval.low <= knee.rate <= knee.interval.high
    bound = find_knee(points[:2], 0.9, random.Random(1))
    assert bound is not None
    assert bound.is_bound
    assert bound.rate == 2.0
    assert find_knee([], 0.9, random.Random(1)) is None


def test_the_sweep_doubles_halves_and_bisects() -> None:
    def then(*tried: tuple[float, int]) -> float | None:
        points = [RatePoint(rate=rate, real_rate=rate, good=good, total=10) for rate, good in tried]
        return next_rate(points, target=0.9, first=1.0, precision=0.1)

    assert then() == 1.0
    assert then((1.0, 10)) == 2.0
    assert then((1.0, 5)) == 0.5
    assert then((1.0, 10), (2.0, 8)) == 1.5
    assert then((1.0, 10), (1.05, 8)) is None
    assert then((1.0, 1), (1 / 64, 1)) is None


# ---------------------------------------------------------------------------------------- prompts and answers


async def test_words_of_several_tokens_are_found_out_by_asking() -> None:
    several = {"people", "weather", "teacher"}
    asked = 0

    async def count(text: str) -> int:
        nonlocal asked
        asked += 1
        return 9 + sum(2 if word in several else 1 for word in text.split())

    prompts = await learn_words(count)
    assert set(WORDS) - set(prompts.words) == several & set(WORDS)
    assert prompts.overhead_tokens == 9
    text = prompts.text(64, random.Random(1))
    assert await count(text) == 64
    assert text != prompts.text(64, random.Random(2))
    assert asked < 40
    with pytest.raises(BenchRefused):
        prompts.text(9, random.Random(1))


async def test_a_tokenizer_that_splits_every_word_is_refused() -> None:
    async def count(text: str) -> int:
        return len(text)

    with pytest.raises(BenchRefused):
        await learn_words(count)


def test_prompts_of_ids() -> None:
    ids = parse_vocabulary("100:200").ids(50, random.Random(1))
    assert len(ids) == 50
    assert all(100 <= one < 200 for one in ids)
    with pytest.raises(BenchRefused):
        parse_vocabulary("5")


def test_an_answer_however_it_is_cut() -> None:
    events = (
        b'id: 1\ndata: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\r\n\r\n'
        b': ping\n\ndata: {"choices":[{"delta":{"content":"a"}}],"usage":null}\n\n'
        b'data: {"choices":[{"delta":{"content":"b"},"finish_reason":"length"}]}\n\n'
        b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":2}}}\n\n'
        b"data: [DONE]\n\n"
    )
    for size in (1, 7, 50, len(events)):
        reader = AnswerReader()
        for at in range(0, len(events), size):
            reader.feed(events[at : at + size], float(at))
        assert reader.failure is None
        assert len(reader.arrivals) == 2
        assert reader.usage is not None
        assert (reader.usage.prompt_tokens, reader.usage.completion_tokens) == (7, 3)
        assert reader.usage.prompt_tokens_details is not None
        assert reader.usage.prompt_tokens_details.cached_tokens == 2


@pytest.mark.parametrize(
    ("events", "why"),
    [
        (b'data: {"choices":[{"text":"a"}]}\n\n', "ended early"),
        (b"data: [DONE]\n\n", "without text"),
        (b'data: {"error":{"message":"boom"}}\n\ndata: [DONE]\n\n', "boom"),
        (b"data: {nonsense\n\ndata: [DONE]\n\n", "not a chunk"),
    ],
)
def test_an_answer_that_is_not_well_says_why(events: bytes, why: str) -> None:
    reader = AnswerReader()
    reader.feed(events, 0.0)
    assert why in (reader.failure or "")


# ---------------------------------------------------------------------------------------- stages, results, reports


def test_stages_as_far_as_their_moments_are_recorded() -> None:
    moments = {"prefill_started": 0.1, "first_token": 0.4, "transferred": 0.45, "decode_started": 0.5, "end": 2.0}
    stages = stages_of(moments)
    assert list(stages) == [stage.name for stage in STAGES]
    assert sum(stages.values()) == pytest.approx(moments["end"])
    assert stages["prefill"] == pytest.approx(0.3)
    coarse = summarise_stages([a_result(stages_s={"first_token": 0.4, "end": 2.0})])
    assert coarse.missing == ("prefill_started", "transferred", "decode_started")
    assert set(coarse.stages) == {"until the first token", "after it"}
    assert summarise_stages([a_result()]).timelines == 0


def test_results_are_found_again_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    points = [a_point((a_result(0), a_result(1, error="x"))), a_point((a_result(0),), rate=2.0)]
    file = ResultsFile(path)
    for point in points:
        file.add(point)
    path.write_bytes(path.read_bytes()[:-9])
    again = ResultsFile(path)
    assert again.get(points[0].key) == points[0]
    assert again.get(points[1].key) is None
    again.add(points[1])
    assert ResultsFile(path).get(points[1].key) == points[1]
    path.write_text("{}\n")
    with pytest.raises(BenchRefused):
        ResultsFile(path)


def test_one_report_in_every_form() -> None:
    results = tuple(a_result(number, first=0.5 + number / 50, scheduled_s=number / 10) for number in range(20))
    report = report_of(
        [a_point(results), a_point((*results, a_result(20, error="<gone>", tokens=0)), rate=2.0)], OBJECTIVES, target=0.9
    )
    as_json = json.loads(json.dumps(report_json(report)))
    first = as_json["points"][0]
    assert first["completed"] == 20
    assert first["total_output_tokens"] == 100
    assert {"mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms", "std_tpot_ms", "p99_itl_ms", "mean_e2el_ms"} <= set(first)
    assert first["aiperf"]["time_to_first_token"]["unit"] == "ms"
    assert first["aiperf"]["request_count"]["avg"] == 20
    assert as_json["points"][1]["failed"] == 1
    lines = list(request_lines([figures.point for figures in report.points], OBJECTIVES))
    assert len(lines) == 41
    assert json.loads(json.dumps(lines[0]))["good"] is True
    assert "1 x <gone>" in as_text(report)
    page = as_html(report, "a <title>")
    assert "&lt;gone&gt;" in page
    assert "<gone>" not in page
    assert page.count("<svg") == 6
    assert "http" not in page, "nothing is loaded from anywhere"


def test_predictions_of_the_simulator_are_drawn_beside() -> None:
    rows = [{"deployment": "1:1", "rate": 1.0, "tried": [[2.0, 0.7], [1.0, 0.95]]}]
    rows += [{"deployment": "2:1 <x>", "offered_rps": rate, "total": {"attained": 0.8, "name": "all"}} for rate in (0.5, 1.5)]
    predictions = parse_predictions(json.dumps(rows).encode())
    assert [(one.deployment, dict(one.shares)) for one in predictions] == [
        ("1:1", {1.0: 0.95, 2.0: 0.7}),
        ("2:1 <x>", {0.5: 0.8, 1.5: 0.8}),
    ]
    page = as_html(report_of([a_point((a_result(),))], OBJECTIVES, target=0.9), "t", predictions)
    assert "predicted: 1:1" in page
    assert "predicted: 2:1 &lt;x&gt;" in page
    with pytest.raises(BenchRefused):
        parse_predictions(b"{}")


def test_an_empty_point_is_reported_too() -> None:
    report = report_of([a_point((a_result(error="refused", tokens=0),), rate=None)], {}, target=0.9)
    assert report.knee is None
    assert "refused" in as_text(report)
    assert "<html" in as_html(report, "t")
    assert report_json(report)["curve"] == []


def test_the_bar_has_one_width() -> None:
    for sent, ended in ((0, 0), (5, 2), (10, 10)):
        line = progress_line("t", Progress(10, sent, ended, 1), 3.0)
        assert sum(line.count(cell) for cell in "█▒·") == WIDTH
    assert "1 failed" in line
