"""Non-negative least squares for a handful of columns, from running sums.

The sums (a Gram matrix) can be added to, forgotten and taken from, so one class serves a first fit, leave-one-out errors and a
refit while serving. With at most four columns every set of columns that may be non-zero is tried: exact, and a page shorter
than an active-set method.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

SINGULAR = 1e-10
"""A pivot below this share of its column is rounding: the columns depend on each other there."""


@dataclass(slots=True)
class SquareSums:
    """Sums over samples of `row·row`, `row·target` and `target²`, each times the sample's weight."""

    columns: int
    gram: list[list[float]] = field(init=False)
    cross: list[float] = field(init=False)
    square: float = 0.0
    weight: float = 0.0

    def __post_init__(self) -> None:
        self.gram = [[0.0] * self.columns for _ in range(self.columns)]
        self.cross = [0.0] * self.columns

    def add(self, row: Sequence[float], target: float, weight: float = 1.0) -> None:
        """A negative weight takes a sample out again."""
        for i, value in enumerate(row):
            for j, other in enumerate(row):
                self.gram[i][j] += weight * value * other
            self.cross[i] += weight * value * target
        self.square += weight * target * target
        self.weight += weight

    def forget(self, share_kept: float) -> None:
        """Everything so far counts that much less from now on."""
        self.gram = [[value * share_kept for value in row] for row in self.gram]
        self.cross = [value * share_kept for value in self.cross]
        self.square *= share_kept
        self.weight *= share_kept

    def plus(self, other: "SquareSums") -> "SquareSums":
        """The sums of both; neither changes."""
        total = SquareSums(self.columns)
        total.gram = [[a + b for a, b in zip(mine, theirs, strict=True)] for mine, theirs in zip(self.gram, other.gram, strict=True)]
        total.cross = [a + b for a, b in zip(self.cross, other.cross, strict=True)]
        total.square = self.square + other.square
        total.weight = self.weight + other.weight
        return total

    def stretched(self, factor: float) -> "SquareSums":
        """The sums as they would be had every row been divided by the factor: for relative errors, all times that much longer."""
        stretched = SquareSums(self.columns)
        stretched.gram = [[value / factor**2 for value in row] for row in self.gram]
        stretched.cross = [value / factor for value in self.cross]
        stretched.square, stretched.weight = self.square, self.weight
        return stretched

    def residual(self, solution: Sequence[float]) -> float:
        """The weighted sum of squared errors of a solution."""
        quadratic = sum(a * b * self.gram[i][j] for i, a in enumerate(solution) for j, b in enumerate(solution))
        return self.square - 2.0 * sum(a * b for a, b in zip(solution, self.cross, strict=True)) + quadratic


def non_negative_solution(sums: SquareSums) -> list[float]:
    """The non-negative coefficients with the least squared error.

    Of sets of columns that explain the samples equally well the smallest is taken: what the samples cannot tell apart is not
    split at random between two columns.
    """
    best = [0.0] * sums.columns
    least = sums.square
    slack = 1e-12 * max(sums.square, 1e-300)
    for size in range(1, sums.columns + 1):
        for chosen in combinations(range(sums.columns), size):
            solution = _solve(sums, chosen)
            if solution is not None and min(solution) >= 0.0:
                residual = sums.residual(solution)
                if residual < least - slack:
                    best, least = solution, residual
    return best


def _solve(sums: SquareSums, chosen: Sequence[int]) -> list[float] | None:
    """Least squares over the chosen columns (Gaussian elimination on columns scaled to length one); None where they are
    dependent."""
    scale = [sums.gram[i][i] ** 0.5 for i in chosen]
    if min(scale) <= 0.0:
        return None
    rows = [
        [sums.gram[i][j] / (scale[a] * scale[b]) for b, j in enumerate(chosen)] + [sums.cross[i] / scale[a]]
        for a, i in enumerate(chosen)
    ]
    size = len(chosen)
    for column in range(size):
        pivot = max(range(column, size), key=lambda row: abs(rows[row][column]))
        if abs(rows[pivot][column]) < SINGULAR:
            return None
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for row in range(column + 1, size):
            factor = rows[row][column] / rows[column][column]
            rows[row] = [value - factor * above for value, above in zip(rows[row], rows[column], strict=True)]
    scaled = [0.0] * size
    for row in reversed(range(size)):
        known = sum(rows[row][k] * scaled[k] for k in range(row + 1, size))
        scaled[row] = (rows[row][size] - known) / rows[row][row]
    solution = [0.0] * sums.columns
    for a, i in enumerate(chosen):
        solution[i] = scaled[a] / scale[a]
    return solution
