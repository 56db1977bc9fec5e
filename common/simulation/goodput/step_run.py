"""A run of steps in closed form: as long as nobody joins or leaves, each takes a fixed time more than the one before.

A decode step reads one more token per sequence than the last, and a step with a full chunk of a prompt reads a chunk more, so
step j of a run takes first + j·growth. Ten thousand steps are then one event.
"""

import math


class StepRun:
    """`end` is the number of steps after which something happens. `growth` is not negative."""

    __slots__ = ("end", "first_s", "growth_s", "start")

    def __init__(self, start: float, first_s: float, growth_s: float, end: int) -> None:
        self.start = start
        self.first_s = first_s
        self.growth_s = growth_s
        self.end = end

    def time_at(self, steps: int) -> float:
        """When that many steps are done."""
        return self.start + steps * self.first_s + self.growth_s * (steps * (steps - 1) // 2)

    def next_boundary(self, now: float) -> int:
        """The least number of steps that is not done before `now`. The square root only guesses; what counts is `time_at`."""
        passed = now - self.start
        if passed <= 0.0:
            return 0
        if self.first_s <= 0.0:
            return self.end
        half = 0.5 * self.growth_s
        linear = self.first_s - half
        if half > 0.0:
            guess = (math.sqrt(linear * linear + 4.0 * half * passed) - linear) / (2.0 * half)
        else:
            guess = passed / linear
        steps = min(self.end, max(0, math.ceil(guess)))
        while steps > 0 and self.time_at(steps - 1) >= now:
            steps -= 1
        while steps < self.end and self.time_at(steps) < now:
            steps += 1
        return steps

    def done_before(self, now: float) -> int:
        """Steps that are over before `now`."""
        return max(0, self.next_boundary(now) - 1)
