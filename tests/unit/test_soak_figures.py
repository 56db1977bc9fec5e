"""What a soak reports: growth by least squares, per process, and keys against the requests that made them."""

import pytest

from tests.faults.soak_figures import LEAST_POINTS, Figures, slope


def test_growth_is_the_slope_of_the_line_whatever_the_noise_around_it() -> None:
    assert slope([(float(x), 3.0 + 0.5 * x) for x in range(9)]) == pytest.approx(0.5)
    assert slope([(float(x), 7.0 + (-1) ** x) for x in range(1001)]) == pytest.approx(0.0, abs=1e-3)


def test_a_leak_is_shown_and_a_short_life_is_not() -> None:
    long, short = 4 * LEAST_POINTS, LEAST_POINTS // 2
    figures = Figures(
        memory={"leaks": [(5.0 * n, 100.0 + n) for n in range(long)], "short": [(5.0 * n, 1.0) for n in range(short)]},
        keys=[(5.0 * n, 12 * n, 2 * n) for n in range(long)],
    )
    leak, keys = figures.lines()
    assert leak.startswith("leaks:")
    assert "+12.00 MiB a minute" in leak
    assert "6.00 to 6.00, +0.000 a minute" in keys
