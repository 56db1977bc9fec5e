"""Named points in a service's life at which tests let it die, freeze or err: faults by place, not by time.

`SEGUE_FAILPOINTS="decode.step=kill@5;pull.started=stop"`: at the fifth pass of `decode.step` the process kills itself, at the
first of `pull.started` it stops (SIGSTOP). A point fires once. `token=17` after the action lets only passes count that concern a
prompt with that token. Nothing is armed unless the setting says so.

| action | what happens |
| --- | --- |
| `kill`, `stop` | SIGKILL, SIGSTOP of the own process |
| `exit` | the process ends at once, status 70 |
| `hang` | the event loop blocks for good |
| `raise` | a RuntimeError at that point |
| `flip` | a byte of the KV block at hand is changed (`kv.sealed` only) |
"""

import ctypes
import os
import signal
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from common.mesh.engine_values import FilledBlock
from common.ports.kv_transport import KvRegion
from common.protocol.messages import ControlMessage
from common.values.errors import SettingsError
from common.values.step import StepPlan

Action = Literal["kill", "stop", "exit", "hang", "raise", "flip"]
ACTIONS: tuple[Action, ...] = ("kill", "stop", "exit", "hang", "raise", "flip")
_MESSAGES = ("offer", "accept", "busy", "refuse", "ready", "last", "ack", "withdraw", "held")
POINTS = (
    *("dispatch.accepted", "prefill.step_started", "decode.step", "prefill.chunk_sealed", "kv.sealed", "pull.started", "pull.done"),
    *("first_token.sent", "tokens.sent", "log.appended", "gateway.dispatched", "gateway.first_token", "gateway.delivering"),
    *(
        f"{message}.{way}"
        for message in ("offer", "accept", "busy", "refuse", "ready", "last", "ack", "withdraw", "held")
        for way in ("sent", "received")
    ),
)
EXIT_STATUS = 70


@dataclass(slots=True, kw_only=True)
class _Armed:
    action: Action
    passes_left: int
    token: int | None


class Failpoints:
    """What is armed in this process; `Failpoints()` is nothing."""

    def __init__(self, text: str | None = None) -> None:
        """Raises SettingsError for a point or an action that does not exist."""
        self._armed: dict[str, _Armed] = {}
        self._tokens: dict[int, frozenset[int]] = {}
        for part in filter(None, (part.strip() for part in (text or "").split(";"))):
            point, _, rest = part.partition("=")
            action, _, token = rest.partition(",token=")
            action, _, nth = action.partition("@")
            if point not in POINTS or action not in ACTIONS or not (nth or "1").isdigit() or not (token or "0").isdigit():
                raise SettingsError(
                    f"failpoints: {part!r} is not POINT=ACTION[@N][,token=ID]; "
                    f"points: {', '.join(POINTS)}; actions: {', '.join(ACTIONS)}"
                )
            self._armed[point] = _Armed(action=action, passes_left=int(nth or 1), token=int(token) if token else None)

    def hit(self, point: str, tokens: Collection[int] = ()) -> None:
        """Pass a point; `tokens` is the prompt that it concerns. May not return."""
        armed = self._armed.get(point)
        if armed is None or (armed.token is not None and armed.token not in tokens):
            return
        armed.passes_left -= 1
        if armed.passes_left == 0:
            _perform(point, armed.action)

    def step(self, plan: StepPlan) -> None:
        """A step is about to be computed."""
        if not self._armed:
            return
        for start in plan.starts:
            self._tokens[start.handle] = frozenset(start.tokens[: start.prompt_length])
        for row in plan.rows:
            self.hit("decode.step" if row.count == 1 else "prefill.step_started", self._tokens.get(row.handle, frozenset()))
        for handle in plan.ends:
            self._tokens.pop(handle, None)

    def control(self, message: ControlMessage, way: Literal["sent", "received"]) -> None:
        """A message between two workers."""
        if self._armed:
            self.hit(f"{type(message).__name__.lower()}.{way}")

    def sealed(self, region: KvRegion, blocks: Iterable[FilledBlock]) -> None:
        """The checksums of these blocks exist. Only a prompt's last, partly filled block is a pass: its owner reads it no more,
        so that a flipped byte is an error of the way to the peer."""
        armed = self._armed.get("kv.sealed")
        for filled in blocks:
            if armed is None or armed.passes_left == 0:
                return
            if filled.valid == region.layout.block_size:
                continue
            armed.passes_left -= 1
            if armed.passes_left == 0 and armed.action == "flip":
                _flip(region, filled.block)
            elif armed.passes_left == 0:
                _perform("kv.sealed", armed.action)


def _perform(point: str, action: Action) -> None:
    match action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "exit":
            os._exit(EXIT_STATUS)
        case "hang":
            while True:
                time.sleep(3600)
        case "raise":
            raise RuntimeError(f"failpoint {point}")
        case "flip":
            raise RuntimeError(f"failpoint {point}: flip is for kv.sealed")


def _flip(region: KvRegion, block: int) -> None:
    address = region.blocks_address + block * region.layout.block_bytes
    byte = ctypes.c_ubyte.from_address(address)
    byte.value ^= 0x5A
