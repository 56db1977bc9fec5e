"""A step-time model as a file: a calibration, or JSON with the coefficients alone, in seconds, under the names that the model has."""

from dataclasses import asdict
from pathlib import Path

import msgspec

from common.policy.step_time import StepTime
from common.runtime.calibration_file import load_step_time


def read_step_time(path: Path) -> StepTime:
    """Raises SettingsError."""
    return load_step_time(path)


def write_step_time(path: Path, step_time: StepTime) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(asdict(step_time)), indent=1) + b"\n")
