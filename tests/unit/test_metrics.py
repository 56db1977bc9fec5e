"""The exposition text, and that label sets stay bounded."""

import pytest

from common.runtime.metrics import MAX_SERIES, Metrics


def test_exposition_of_all_kinds() -> None:
    metrics = Metrics()
    requests = metrics.counter("requests_total", "Requests.", ("outcome",))
    requests.series("ok").add()
    requests.series("ok").add(2)
    requests.series('a"b\n').add(0.5)
    metrics.gauge("running", "Now.").series().set(3)
    delay = metrics.histogram("delay_seconds", "Delay.", ("model",), buckets=(0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 7.0):
        delay.series("m").observe(value)
    assert metrics.exposition().splitlines() == [
        "# HELP requests_total Requests.",
        "# TYPE requests_total counter",
        'requests_total{outcome="ok"} 3',
        'requests_total{outcome="a\\"b\\n"} 0.5',
        "# HELP running Now.",
        "# TYPE running gauge",
        "running 3",
        "# HELP delay_seconds Delay.",
        "# TYPE delay_seconds histogram",
        'delay_seconds_bucket{model="m",le="0.1"} 2',
        'delay_seconds_bucket{model="m",le="1"} 3',
        'delay_seconds_bucket{model="m",le="+Inf"} 4',
        'delay_seconds_sum{model="m"} 7.65',
        'delay_seconds_count{model="m"} 4',
    ]


def test_gauge_follows_its_source() -> None:
    metrics = Metrics()
    queue: list[int] = []
    metrics.gauge("queued", "Now.").series().follow(lambda: float(len(queue)))
    queue += [1, 2]
    assert "queued 2\n" in metrics.exposition()


def test_label_sets_are_bounded() -> None:
    metrics = Metrics()
    counter = metrics.counter("hits_total", "Hits.", ("who",))
    for client in range(3 * MAX_SERIES):
        counter.series(str(client)).add()
    lines = [line for line in metrics.exposition().splitlines() if not line.startswith("#")]
    assert len(lines) == MAX_SERIES + 1
    assert f'hits_total{{who="other"}} {2 * MAX_SERIES}' in lines


def test_names_and_labels_are_checked() -> None:
    metrics = Metrics()
    counter = metrics.counter("hits_total", "Hits.", ("who",))
    with pytest.raises(ValueError, match="there already"):
        metrics.gauge("hits_total", "Hits.")
    with pytest.raises(ValueError, match="has the labels"):
        counter.series()
