"""A step-time model as a file: JSON with the coefficients in seconds, under the names that the model has."""

from dataclasses import asdict
from pathlib import Path

import msgspec

from common.policy.step_time import StepTime
from common.values.errors import SettingsError


def read_step_time(path: Path) -> StepTime:
    try:
        return msgspec.json.decode(path.read_bytes(), type=StepTime)
    except (OSError, msgspec.MsgspecError, ValueError) as error:
        raise SettingsError(f"{path} has no step-time model: {error}") from None


def write_step_time(path: Path, step_time: StepTime) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(asdict(step_time)), indent=1) + b"\n")
