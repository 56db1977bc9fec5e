"""Where calibrations lie on this host, and how they are written and read.

One file a (CPU, weights, dtype, kernels, device, threads), `calibration/` in the cache: what a worker finds there is its step-time
model before it has run a step. A file of a newer format is refused, not misread.
"""

import contextlib
import os
import re
from dataclasses import asdict
from pathlib import Path

import msgspec
import xxhash

from common.policy.calibration import FORMAT, Calibration, CalibrationSubject
from common.policy.step_time import StepTime
from common.values.errors import SettingsError

FOLDER = "calibration"


def calibration_path(cache_dir: Path, subject: CalibrationSubject) -> Path:
    """The same for every worker that computes alike, whatever name its model is served under."""
    where = subject.endpoint or subject.weights
    parts = (subject.cpu, where, subject.dtype, subject.kernels, subject.device, str(subject.threads))
    named = (*parts, subject.model) if subject.endpoint else parts
    digest = xxhash.xxh3_64_hexdigest("\0".join(named).encode())
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", subject.model.rsplit("/", 1)[-1])[:48].strip("-.") or "model"
    return cache_dir / FOLDER / f"{readable}-{digest}.json"


def known_calibration(cache_dir: Path, subject: CalibrationSubject) -> Calibration | None:
    """None where this was never measured here, or by a newer release. The file's name carries the model's name as well, which
    may be another one here: the digest decides."""
    digest = calibration_path(cache_dir, subject).stem.rsplit("-", 1)[1]
    for path in sorted((cache_dir / FOLDER).glob(f"*-{digest}.json")):
        with contextlib.suppress(SettingsError):
            return load_calibration(path)
    return None


def save_calibration(path: Path, calibration: Calibration) -> None:
    """Whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(calibration_json(calibration))
    partial.rename(path)


def calibration_json(calibration: Calibration) -> bytes:
    return msgspec.json.format(msgspec.json.encode(asdict(calibration)), indent=1) + b"\n"


def load_calibration(path: Path) -> Calibration:
    """Raises SettingsError."""
    return _decode_calibration(path, _read(path))


def load_step_time(path: Path) -> StepTime:
    """The step-time model of a calibration, or of a file with nothing but coefficients. Raises SettingsError."""
    content = _read(path)
    if _format_of(content) is not None:
        return _decode_calibration(path, content).step_time
    try:
        return msgspec.json.decode(content, type=StepTime)
    except (msgspec.MsgspecError, ValueError) as error:
        raise SettingsError(f"{path} has no step-time model: {error}") from None


class _Head(msgspec.Struct):
    format: int | None = None


def _format_of(content: bytes) -> int | None:
    try:
        return msgspec.json.decode(content, type=_Head).format
    except msgspec.MsgspecError:
        return None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{path} has no step-time model: {error}") from None


def _decode_calibration(path: Path, content: bytes) -> Calibration:
    found = _format_of(content)
    if found is not None and found > FORMAT:
        raise SettingsError(f"{path} is a calibration of format {found}; this release reads up to {FORMAT}: calibrate again")
    try:
        return msgspec.json.decode(content, type=Calibration)
    except (msgspec.MsgspecError, ValueError) as error:
        raise SettingsError(f"{path} is no calibration: {error}") from None
