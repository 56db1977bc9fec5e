"""Named points in a service's life at which tests let it die, freeze or err: faults by place, not by time.

`SEGUE_FAILPOINTS="decode.step=kill@5;pull.started=stop"`: at the fifth pass of `decode.step` the process kills itself, at the
first of `pull.started` it stops (SIGSTOP). A point fires once. Nothing is armed unless the setting says so. After the action:
`token=17` lets only passes count that concern a prompt with that token; `at=40` only steps that compute that position (at
`step.position`, whichever phase computes it); `ms=500` is how long a pause takes.

| action | what happens |
| --- | --- |
| `kill`, `stop` | SIGKILL, SIGSTOP of the own process |
| `exit` | the process ends at once, status 70 |
| `hang` | the event loop blocks for good |
| `raise` | a RuntimeError at that point |
| `pause` | the event loop blocks for a while (300 ms), after a line in the log says so: time for others to act at that point |
| `flip` | a byte of the KV block at hand is changed (`kv.sealed` only) |
"""

import ctypes
import logging
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

Action = Literal["kill", "stop", "exit", "hang", "raise", "pause", "flip"]
ACTIONS: tuple[Action, ...] = ("kill", "stop", "exit", "hang", "raise", "pause", "flip")
SELECTORS = ("token", "at", "ms")
_MESSAGES = ("offer", "accept", "busy", "refuse", "ready", "last", "ack", "withdraw", "held")
POINTS = (
    *("dispatch.accepted", "prefill.step_started", "decode.step", "prefill.chunk_sealed", "kv.sealed", "pull.started", "pull.done"),
    *("step.position", "preempted", "first_token.sent", "tokens.sent", "end.sent", "log.appended"),
    *("gateway.dispatched", "gateway.first_token", "gateway.delivering"),
    *(f"{message}.{way}" for message in _MESSAGES for way in ("sent", "received")),
)
EXIT_STATUS = 70
PAUSE_MS = 300
logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class _Armed:
    action: Action
    passes_left: int
    token: int | None
    at: int | None
    pause_s: float


class Failpoints:
    """What is armed in this process; `Failpoints()` is nothing."""

    def __init__(self, text: str | None = None) -> None:
        """Raises SettingsError for a point or an action that does not exist."""
        self._armed: dict[str, _Armed] = {}
        self._tokens: dict[int, frozenset[int]] = {}
        self._preemptions = 0
        for part in filter(None, (part.strip() for part in (text or "").split(";"))):
            point, armed = _parse(part)
            self._armed[point] = armed

    def is_armed(self, point: str) -> bool:
        return point in self._armed

    def hit(self, point: str, tokens: Collection[int] = ()) -> None:
        """Pass a point; `tokens` is the prompt that it concerns. May not return."""
        armed = self._armed.get(point)
        if armed is None or (armed.token is not None and armed.token not in tokens):
            return
        armed.passes_left -= 1
        if armed.passes_left == 0:
            _perform(point, armed)

    def step(self, plan: StepPlan) -> None:
        """A step is about to be computed."""
        if not self._armed:
            return
        for start in plan.starts:
            self._tokens[start.handle] = frozenset(start.tokens[: start.prompt_length])
        for row in plan.rows:
            tokens = self._tokens.get(row.handle, frozenset())
            self.hit("decode.step" if row.count == 1 else "prefill.step_started", tokens)
            position = self._armed.get("step.position")
            if position is not None and position.at in range(row.start, row.start + row.count):
                self.hit("step.position", tokens)
        for handle in plan.ends:
            self._tokens.pop(handle, None)

    def preempted(self, total: int) -> None:
        """So many sequences have lost their blocks since the start; each is a pass."""
        while self._preemptions < total:
            self._preemptions += 1
            self.hit("preempted")

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
                _perform("kv.sealed", armed)


def _parse(part: str) -> tuple[str, _Armed]:
    point, _, rest = part.partition("=")
    act, *selectors = rest.split(",")
    action, _, nth = act.partition("@")
    given = dict.fromkeys(SELECTORS, "")
    given.update(selector.partition("=")[::2] for selector in selectors)
    numbers = (nth or "1", *(value or "0" for value in given.values()))
    if point not in POINTS or action not in ACTIONS or len(given) > len(SELECTORS) or not all(n.isdigit() for n in numbers):
        raise SettingsError(
            f"failpoints: {part!r} is not POINT=ACTION[@N][,token=ID][,at=POSITION][,ms=N]; "
            f"points: {', '.join(POINTS)}; actions: {', '.join(ACTIONS)}"
        )
    return point, _Armed(
        action=action,
        passes_left=int(nth or 1),
        token=int(given["token"]) if given["token"] else None,
        at=int(given["at"]) if given["at"] else None,
        pause_s=int(given["ms"] or PAUSE_MS) / 1000,
    )


def _perform(point: str, armed: _Armed) -> None:
    match armed.action:
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
        case "pause":
            logger.warning("failpoint", extra={"fields": {"point": point, "action": "pause"}})
            time.sleep(armed.pause_s)
        case "flip":
            raise RuntimeError(f"failpoint {point}: flip is for kv.sealed")


def _flip(region: KvRegion, block: int) -> None:
    address = region.blocks_address + block * region.layout.block_bytes
    byte = ctypes.c_ubyte.from_address(address)
    byte.value ^= 0x5A
