"""Fixtures that start real servers; each test gets its own, on a port of its own."""

from collections.abc import AsyncIterator

import pytest_asyncio

from tests.servers import RunningServer, running_nats, running_valkey


@pytest_asyncio.fixture
async def nats_server() -> AsyncIterator[RunningServer]:
    async with running_nats() as server:
        yield server


@pytest_asyncio.fixture
async def valkey_server() -> AsyncIterator[RunningServer]:
    async with running_valkey() as server:
        yield server
