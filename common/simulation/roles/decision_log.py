"""Decisions as lines of JSON, with the views that they were made from: enough to make them again, byte for byte.

The first line of a model holds the controller's settings; each later one a view and what was decided. A log that is appended to by
another run begins the model anew.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec

from common.policy.role_control import RoleDecision
from common.policy.role_view import MeshView
from common.simulation.roles.role_controller import ControllerSettings, RoleController
from common.values.errors import SettingsError


class BeginLine(msgspec.Struct, frozen=True, kw_only=True, tag="begin", tag_field="line"):
    model: str
    settings: ControllerSettings


class DecisionLine(msgspec.Struct, frozen=True, kw_only=True, tag="decision", tag_field="line"):
    """`wall_time`: seconds since 1970, for people; nothing is decided by it. `acted`: a role change was sent."""

    model: str
    wall_time: float
    acted: bool
    view: MeshView
    decision: RoleDecision


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """`same`: what was decided again has the bytes of what was decided then."""

    model: str
    logged: RoleDecision
    again: RoleDecision
    same: bool


def encode_line(line: BeginLine | DecisionLine) -> bytes:
    return msgspec.json.encode(line) + b"\n"


def replay(lines: Iterable[bytes]) -> Iterator[Replayed]:
    """Raises SettingsError where a line is none of ours."""
    controllers: dict[str, RoleController] = {}
    for number, text in enumerate(lines, start=1):
        try:
            line = msgspec.json.decode(text, type=BeginLine | DecisionLine)
        except (msgspec.MsgspecError, ValueError) as error:
            raise SettingsError(f"line {number} is no line of a decision log: {error}") from None
        if isinstance(line, BeginLine):
            controllers[line.model] = RoleController(line.settings)
            continue
        if line.model not in controllers:
            raise SettingsError(f"line {number}: the settings of {line.model} are missing before it")
        again = controllers[line.model].decide(line.view)
        same = msgspec.json.encode(again) == msgspec.json.encode(line.decision)
        yield Replayed(model=line.model, logged=line.decision, again=again, same=same)
