"""The life of one sequence in a worker's engine.

    submit ──▶ WAITING ──start──▶ RUNNING ──hold──▶ HELD ──keep──▶ RUNNING
                  ▲                  │                │
                  └────preempt───────┘                │
    reserve ─▶ LANDING ──activate──▶ RUNNING          │
                  └──abandon──▶ ABANDONED ──reclaim──▶ RELEASED ◀──release── any state but ABANDONED

A waiting sequence holds no blocks; a released one may hold some until the steps and the pins on it are over.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Literal


class Phase(Enum):
    """WAITING: no blocks, in the queue. RUNNING: has blocks, takes part in steps. HELD: prompt and first token are done, a
    hand-off decides. LANDING: blocks are being imported. ABANDONED: given up while a copy still writes into its blocks."""

    WAITING = "waiting"
    RUNNING = "running"
    HELD = "held"
    LANDING = "landing"
    ABANDONED = "abandoned"
    RELEASED = "released"


LifeEvent = Literal["start", "hold", "keep", "preempt", "activate", "abandon", "reclaim", "release"]
"""`start`: blocks for all of its tokens were found. `hold`: its first new token was made and it is to be handed off. `keep`:
the hand-off came to nothing. `activate`: the import is over. `reclaim`: the copy into it has returned."""

TRANSITIONS: Mapping[Phase, Mapping[LifeEvent, Phase]] = {
    Phase.WAITING: {"start": Phase.RUNNING, "release": Phase.RELEASED},
    Phase.RUNNING: {"hold": Phase.HELD, "preempt": Phase.WAITING, "release": Phase.RELEASED},
    Phase.HELD: {"keep": Phase.RUNNING, "release": Phase.RELEASED},
    Phase.LANDING: {"activate": Phase.RUNNING, "abandon": Phase.ABANDONED, "release": Phase.RELEASED},
    Phase.ABANDONED: {"reclaim": Phase.RELEASED},
    Phase.RELEASED: {},
}
"""What is not in the table is a broken invariant: the engine is told what to do, by its worker alone."""
