"""Calibration files: what is written is read, each way of computing finds its own, and what cannot be read is said."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from common.policy.calibration import (
    FORMAT,
    Calibration,
    CalibrationSubject,
    DecodePoint,
    MixedPoint,
    PrefillPoint,
    fit_step_time,
    residuals,
)
from common.policy.step_time import Chunk, DecodeLine, DecodeTime, PrefillTime, StepTime
from common.policy.step_time_fit import DecodeSample, PrefillSample
from common.runtime.calibration_file import (
    calibration_json,
    calibration_path,
    known_calibration,
    load_calibration,
    load_step_time,
    save_calibration,
)
from common.runtime.host_cpu import host_cpu
from common.values.errors import SettingsError

TIME = StepTime(
    prefill=PrefillTime(base_s=0.02, per_token_s=1e-4, per_pair_s=1e-8),
    decode=DecodeTime(
        line=DecodeLine(base_s=0.02, per_kv_token_s=6e-7, per_sequence_s=4e-5),
        knee=16,
        beyond=DecodeLine(base_s=0.005, per_kv_token_s=6e-7, per_sequence_s=1e-3),
    ),
)
SUBJECT = CalibrationSubject(
    model="org/model", cpu="a CPU (25/1/1)", weights="aa", dtype="float32", kernels="avx2", device="cpu", threads=1
)


def calibration(subject: CalibrationSubject = SUBJECT) -> Calibration:
    prefill = [(tokens, past) for tokens in (16, 64, 256, 1024) for past in (0, 512)]
    decode = [(rows, rows * context) for rows in (1, 2, 4, 8, 16, 24, 32) for context in (64, 512)]
    chunks = [PrefillSample(tokens=t, past=p, seconds=TIME.prefill.seconds(t, p)) for t, p in prefill]
    steps = [DecodeSample(sequences=n, kv_tokens=kv, seconds=TIME.decode.seconds(n, kv)) for n, kv in decode]
    both = TIME.mixed_s([Chunk(tokens=64)], 4, 512)
    return Calibration(
        subject=subject,
        build="0.1.0",
        measured_at=1.5e9,
        fitted=fit_step_time(chunks, steps),
        prefill=tuple(PrefillPoint(sample=one, visits=5, spread=0.01) for one in chunks),
        decode=tuple(DecodePoint(sample=one, visits=5) for one in steps),
        mixed=(MixedPoint(tokens=64, past=0, sequences=4, kv_tokens=512, seconds=both),),
        notes=("quiet",),
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = calibration_path(tmp_path, SUBJECT)
    save_calibration(path, calibration())
    assert load_calibration(path) == calibration()
    assert load_step_time(path) == calibration().step_time
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing half written is left"


def test_a_file_of_each_format_is_still_read_in_full() -> None:
    """To add a format: keep a file of it beside these."""
    kept = sorted((Path(__file__).parents[1] / "fixtures" / "calibration").glob("format-*.json"))
    assert len(kept) == FORMAT
    for path in kept:
        again = json.loads(calibration_json(load_calibration(path)))
        assert_within(json.loads(path.read_bytes()), again)


def assert_within(old: object, new: object) -> None:
    """Everything that the old file says is still said."""
    if isinstance(old, dict):
        assert isinstance(new, dict)
        assert old.keys() <= new.keys()
        for key, value in old.items():
            assert_within(value, new[key])
    elif isinstance(old, list):
        assert isinstance(new, list)
        for before, after in zip(old, new, strict=True):
            assert_within(before, after)
    else:
        assert old == new


def test_every_way_of_computing_finds_its_own(tmp_path: Path) -> None:
    assert known_calibration(tmp_path, SUBJECT) is None
    save_calibration(calibration_path(tmp_path, SUBJECT), calibration())
    assert known_calibration(tmp_path, replace(SUBJECT, model="another name")) == calibration()
    others = (
        replace(SUBJECT, cpu="another"),
        replace(SUBJECT, weights="bb"),
        replace(SUBJECT, dtype="bfloat16"),
        replace(SUBJECT, kernels="torch"),
        replace(SUBJECT, device="cuda:0"),
        replace(SUBJECT, threads=2),
    )
    assert len({calibration_path(tmp_path, one) for one in (SUBJECT, *others)}) == 7
    assert all(known_calibration(tmp_path, other) is None for other in others)


def test_a_newer_or_broken_file_is_refused_with_its_name(tmp_path: Path) -> None:
    path = calibration_path(tmp_path, SUBJECT)
    save_calibration(path, calibration())
    content = json.loads(path.read_bytes())
    path.write_text(json.dumps({**content, "format": FORMAT + 1}))
    with pytest.raises(SettingsError, match="calibrate again"):
        load_step_time(path)
    assert known_calibration(tmp_path, SUBJECT) is None
    path.write_text(json.dumps({**content, "a field of the next release": 1}))
    assert load_calibration(path) == calibration(), "a field more is no other format"
    path.write_text("{")
    with pytest.raises(SettingsError, match=path.name):
        load_step_time(path)


def test_the_residuals_of_a_perfect_fit_are_none() -> None:
    rows = residuals(calibration())
    assert len(rows) == 8 + 14 + 1
    assert max(abs(row.error) for row in rows) < 1e-6
    assert calibration().fitted.confidence == "good"


def test_the_cpu_is_told_by_its_numbers_where_its_name_is_hidden(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nmodel name : A CPU\ncpu family : 26\nmodel : 2\nstepping : 1\nflags : avx2 fma\n\nprocessor : 1\n")
    assert host_cpu(info).describe() == "A CPU (26/2/1)"
    assert "avx2" in host_cpu(info).flags
    assert host_cpu(tmp_path / "none").describe()
