"""`segue bench` against `segue serve` with the synthetic engine, as a user runs both: every report is there, and they agree."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from tests.e2e.serving import ROOT, serving

pytestmark = [pytest.mark.servers, pytest.mark.model, pytest.mark.timeout(240)]


async def test_a_sweep_with_all_reports(tmp_path: Path) -> None:
    flags = ["--class", "a:64:8:3", "--class", "b:200:4:1", "--rates", "10,20", "-n", "12", "--warmup", "2", "--seeds", "1"]
    flags += ["--slo", "a:60:5,b:60:5", "--results", str(tmp_path / "results.jsonl"), "--html", str(tmp_path / "report.html")]
    flags += ["--json", str(tmp_path / "report.json"), "--jsonl", str(tmp_path / "requests.jsonl")]
    async with serving("--engine", "synthetic", "--kv-cache-memory", "64MiB", "--placement", "split") as mesh:
        await mesh.until("segue: ready at")
        command = [sys.executable, "-m", "tools.command", "bench", "--endpoint", mesh.url, *flags]
        ended = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        output, errors = await ended.communicate()
    assert ended.returncode == 0, errors.decode()
    assert errors == b"", "no progress bar where there is no terminal"
    assert "goodput: 90% of all requests are good up to at least" in output.decode()
    report = json.loads((tmp_path / "report.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert len(lines) == 28
    for line in lines:
        assert line["error"] is None
        assert line["request_id"]
        assert line["prompt_tokens"] == line["planned_prompt_tokens"] == {"a": 64, "b": 200}[line["kind"]], "exact lengths"
        assert line["output_tokens"] == line["planned_output_tokens"]
        assert line["lag_s"] >= 0.0
        assert 0.0 < line["ttft_s"] <= line["latency_s"]
    for point in report["points"]:
        assert point["completed"] == point["num_prompts"] == 12
        assert point["segue"]["attainment"]["share"] == 1.0
        assert point["segue"]["cached_tokens"] == sum(
            line["cached_tokens"] or 0 for line in lines if line["rate"] == point["request_rate"]
        )
        assert point["segue"]["timelines"] >= 6, "its own timelines; the last may not be written yet"
        assert set(point["segue"]["stages_ms"]) == {"prefill queue", "prefill", "transfer", "decode queue", "decode"}
        assert point["total_output_tokens"] == sum(point["output_lens"])
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 6
    assert "<script" not in page
