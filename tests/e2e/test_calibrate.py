"""`segue calibrate` as a user runs it, on engines whose step times are known: in this process, and behind a gateway."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from common.policy.calibration import Calibration
from common.runtime.calibration_file import load_calibration
from tests.e2e.serving import ROOT, serving
from tools.simulate import main as simulate

STEP_S, TOKEN_S, ROW_S = 0.01, 0.0004, 0.002
SYNTHETIC = (
    *("--engine", "synthetic", "--synthetic-step-s", str(STEP_S)),
    *("--synthetic-prefill-token-s", str(TOKEN_S), "--synthetic-decode-row-s", str(ROW_S)),
)
NOISE = 0.5
"""A machine that does other work is slower, never quicker, and its coefficients lie anywhere near."""
pytestmark = [pytest.mark.model, pytest.mark.timeout(240)]


async def calibrate(*arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "tools.command", "calibrate", *arguments]
    ended = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    output, errors = await ended.communicate()
    assert ended.returncode is not None
    return ended.returncode, output.decode(), errors.decode()


def assert_recovered(found: Calibration) -> None:
    time = found.step_time
    for tokens in (64, 256):
        assert time.prefill.seconds(tokens) == pytest.approx(STEP_S + TOKEN_S * tokens, rel=NOISE)
    for rows in (1, 4):
        assert time.decode.seconds(rows, 64 * rows) == pytest.approx(STEP_S + ROW_S * rows, rel=NOISE)


async def test_an_engine_is_measured_and_the_simulator_takes_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "steps.json"
    status, output, errors = await calibrate(*SYNTHETIC, "--max-model-len", "600", "--seconds", "5", "--output", str(path))
    assert status == 0, errors
    found = load_calibration(path)
    assert_recovered(found)
    assert found.subject.kernels.startswith("synthetic")
    assert all(point.visits >= 2 for point in (*found.prefill, *found.decode, *found.mixed))
    assert "left out one by one: prefill" in output
    assert str(path) in output
    assert simulate(["--step-time", str(path), "--requests", "50", "--rate", "1", "--input", "100", "--output", "10"]) == 0
    assert "1:1" in capsys.readouterr().out


@pytest.mark.servers
async def test_a_server_is_measured_from_outside_within_the_load_that_was_said(tmp_path: Path) -> None:
    bounds = ("--max-requests", "80", "--max-concurrency", "4", "--max-prompt", "384", "--output", str(tmp_path / "server.json"))
    async with serving(*SYNTHETIC, "--kv-cache-memory", "256MiB", "--max-num-batched-tokens", "1024") as mesh:
        await mesh.until("segue: ready at")
        status, output, errors = await calibrate("--endpoint", mesh.url, *bounds, "--dry-run")
        assert (status, output) == (0, "")
        assert "at most 4 at once" in errors
        status, output, errors = await calibrate("--endpoint", mesh.url, *bounds, "--json")
    assert status == 0, errors
    assert "will send 127.0.0.1" in errors
    found = load_calibration(tmp_path / "server.json")
    assert json.loads(output) == json.loads((tmp_path / "server.json").read_bytes())
    assert_recovered(found)
    assert found.subject.endpoint is not None
    assert {point.sample.sequences for point in found.decode} == {1, 2, 3, 4}
    assert found.round_trip_s > 0.0
    assert any("cannot be seen from outside" in note for note in found.notes)


async def test_what_cannot_be_measured_is_said() -> None:
    status, _, errors = await calibrate("--endpoint", "http://127.0.0.1:9")
    assert status == 2
    assert "names no model" in errors
    status, _, errors = await calibrate("--dtyp", "float32")
    assert status == 2
    assert "did you mean --dtype" in errors
