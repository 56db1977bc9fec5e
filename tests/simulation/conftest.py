"""The product's warnings are many where the store of thousands of worlds is away: they are not kept."""

import logging

import pytest


@pytest.fixture(autouse=True)
def _no_warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "common.mesh")
