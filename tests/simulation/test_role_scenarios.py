"""Roles that follow the load do as well as the best split that is known only afterwards, without swinging to and fro."""

import pytest

from common.simulation.roles.role_comparison import compare
from common.simulation.roles.scenarios import scenarios
from tools.simulate_roles import ENDS_OF_FOUR, RULE, deployment

ONE_POINT = 0.01


@pytest.mark.parametrize("name", ["steady", "shift"])
def test_the_controller_is_not_behind_the_best_static_split(name: str) -> None:
    scenario = next(each for each in scenarios(100.0) if each.name == name)
    comparison = compare(scenario, ENDS_OF_FOUR.scaled(0.85), deployment(4, free=False), RULE, seed=0)
    assert comparison.controller.report.total.attained >= comparison.best_static[1] - ONE_POINT
    assert comparison.controller.closest_s is None or comparison.controller.closest_s >= 10.0
