"""`segue simulate`: figures out, and a plain word where something is wrong."""

import json
from pathlib import Path

import pytest

from common.simulation.goodput.distserve_preset import opt_13b
from tools.simulate import main
from tools.simulate_step_time import read_step_time, write_step_time


def test_deployments_are_compared_on_the_same_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    assert (
        main(["--workers", "1:1", "--workers", "2", "--workers", "1:1+free", "--requests", "200", "--rate", "2", "--json", str(out)])
        == 0
    )
    rows = json.loads(out.read_text())
    assert [row["deployment"] for row in rows] == ["1:1", "2 colocated", "1:1 free"]
    assert len({row["offered_rps"] for row in rows}) == 1
    assert rows[0]["split_share"] == 1.0
    assert rows[1]["split_share"] == 0.0
    assert all(0.0 <= row["total"]["low"] <= row["total"]["attained"] <= row["total"]["high"] <= 1.0 for row in rows)
    assert "| 2 colocated" in capsys.readouterr().out


def test_the_same_seed_prints_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--class",
        "a,input=100,output=9,share=3",
        "--class",
        "b,input=900,ttft-ms=900",
        "--requests",
        "300",
        "--placement",
        "random",
    ]
    printed = []
    for _ in range(2):
        assert main([*arguments, "--workers", "2:2"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert len(printed[0].splitlines()) == 5


def test_goodput_is_the_rate_that_attains(tmp_path: Path) -> None:
    out = tmp_path / "knee.json"
    assert main(["--find-goodput", "--requests", "400", "--sigma", "0.5", "--json", str(out)]) == 0
    (knee,) = json.loads(out.read_text())
    assert knee["attained"] >= 0.9
    tried = dict(knee["tried"])
    above = [rate for rate in tried if rate > knee["rate"]]
    assert above
    assert tried[min(above)] < 0.9


def test_traces_are_read_and_brought_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:17:{second:02}.0000000,{100 + second},5" for second in range(60)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")
    assert main(["--trace", str(trace), "--keep-share", "0.5", "--stretch", "2", "--kv-tokens", "150"]) == 0
    printed = capsys.readouterr().out
    assert "60 requests at 1.00/s" in printed
    assert "thinned to" in printed
    assert "stretched 2 times" in printed
    assert "left out" in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--workers", "two"], "--workers takes"),
        (["--workers", "1:0"], "come together"),
        (["--class", "a,speed=3"], "'speed' is none of"),
        (["--class", "a,input=x"], "takes a number"),
        (["--step-time", "/nowhere.json"], "no step-time model"),
        (["--trace", "/nowhere.csv"], "nowhere.csv"),
        (["--rate", "0"], "positive"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert says in capsys.readouterr().err


def test_a_step_time_file_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    write_step_time(path, opt_13b())
    assert read_step_time(path) == opt_13b()
