"""The commands that measure and compare the engine, run as their user runs them, on a tiny model with random weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.engine.native.library import load_library
from tests.tiny_models import LLAMA_CONFIG

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tools.command", *arguments], capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.fixture
def config_path(tmp_path: Path) -> str:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(LLAMA_CONFIG), encoding="utf-8")
    return str(path)


def test_bench_engine_measures_every_case_against_its_limit(config_path: str, tmp_path: Path) -> None:
    core = str(min(os.sched_getaffinity(0)))
    cases = ("--prefill", "24", "--batches", "1,3", "--contexts", "32", "--rounds", "1", "--steps", "2")
    ended = run(
        "bench-engine", config_path, "--load-format", "dummy", "--cores", core, *cases, "--max-num-batched-tokens", "16",
        "--clock", "cpu", "--json", str(tmp_path / "figures.json"),
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    figures: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text())
    measured = {(f["subject"], f["weights"], f["kind"], f["batch"], f["tokens"]) for f in figures["cases"]}
    for weights in ("float32", "bfloat16"):
        kinds = {("prefill", 1, 24), ("decode", 1, 32), ("decode", 3, 32)}
        assert {("segue, torch", weights, *kind) for kind in kinds} <= measured
    if load_library(os.environ) is not None:
        assert {("segue, native", weights, "decode", 3, 32) for weights in ("float32", "bfloat16", "int8", "int4")} <= measured
        assert "4-bit step / float32 limit" in ended.stdout
    assert "native gguf: tiny did not come quantised" in ended.stdout
    assert all(f["seconds"] > 0 and f["share_of_limit"] > 0 for f in figures["cases"])
    assert figures["read_bytes_per_s"] > 0
    assert {peak["dtype"] for peak in figures["peaks"]} >= {"float32", "bfloat16"}
    assert "vLLM: not installed" in ended.stdout
    assert "Prefill, tok/s" in ended.stdout


def test_a_wrong_flag_ends_with_its_name(config_path: str) -> None:
    ended = run("bench-engine", config_path, "--load-format", "dummy", "--weights", "int3")
    assert ended.returncode == 2
    assert "--weights" in ended.stderr
