"""Rounds over all shapes within a time: in each, every shape is visited once, in another order.

A machine that drifts or is disturbed drifts for all shapes alike, and the median of a shape's visits forgets the disturbed ones.
"""

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from tools.calibration.step_shapes import StepShape

Visit = Callable[[StepShape], Awaitable[list[float]]]
LEAST_ROUNDS = 3
FIRST_ROUND_SHARE = 0.25
"""Of the time: shapes that the first round has not come to by then are left out."""


@dataclass(kw_only=True)
class VisitTimes:
    times: dict[StepShape, list[float]] = field(default_factory=dict)
    left_out: tuple[StepShape, ...] = ()
    rounds: int = 0
    """Whole ones."""


async def visit_in_rounds(
    shapes: Sequence[StepShape],
    visit: Visit,
    *,
    budget_s: float,
    clock: Callable[[], float],
    on_visit: Callable[[StepShape, float], None],
    rng: random.Random,
) -> VisitTimes:
    """`shapes` from the quickest on. The time ends in the middle of a round, except in the first few, which are begun only within
    it. `on_visit` is told what comes next and the seconds that have gone by. The very first visits are not counted: they pay for
    memory that nobody has touched."""
    found = VisitTimes()
    began = clock()
    for shape in shapes[:LEAST_ROUNDS]:
        await visit(shape)
    chosen = list(shapes)
    for place, shape in enumerate(shapes):
        on_visit(shape, clock() - began)
        found.times[shape] = await visit(shape)
        if clock() - began > FIRST_ROUND_SHARE * budget_s and place + 1 < len(shapes):
            chosen, found.left_out = list(shapes[: place + 1]), tuple(shapes[place + 1 :])
            break
    found.rounds = 1
    while clock() - began < budget_s:
        rng.shuffle(chosen)
        for shape in chosen:
            if clock() - began >= budget_s and found.rounds >= LEAST_ROUNDS:
                return found
            on_visit(shape, clock() - began)
            found.times[shape] += await visit(shape)
        found.rounds += 1
    return found
