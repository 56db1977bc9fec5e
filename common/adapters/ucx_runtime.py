"""UCX as a worker has it: loaded once, one context and one worker, shared by the shm and the ucx tier.

It also allocates the region, so that a peer on the same host can map it.
"""

import asyncio
import os

from common.adapters.ucp_library import UcpError, UcpMemory, load_libucp
from common.adapters.ucx_driver import OnEndpointLost, OnMessage, Rendezvous, UcxDriver
from common.adapters.ucx_endpoints import UcxEndpoints
from common.adapters.ucx_environment import prepare_environment
from common.values.errors import PeerError


class UcxRuntime:
    """`start` raises PeerError, with the reason, where UCX cannot be had; everything else needs it to have succeeded."""

    driver: UcxDriver
    endpoints: UcxEndpoints

    def __init__(self, host: str, port_range: str | None) -> None:
        self._host = host
        self._port_range = port_range
        self._on_message: OnMessage | None = None
        self._on_endpoint_lost: OnEndpointLost | None = None
        self._memory: UcpMemory | None = None
        self.worker_address = b""

    async def start(self) -> None:
        prepare_environment(os.environ, self._host, self._port_range)
        try:
            library = load_libucp()
        except (OSError, AttributeError) as error:
            raise PeerError(f"libucp cannot be loaded: {error}") from error
        self.driver = UcxDriver(library, self._deliver, self._lost)
        self.endpoints = UcxEndpoints(self.driver)
        try:
            await self.driver.start()
            self.worker_address = await self.driver.call(lambda worker: worker.address())
        except UcpError as error:
            await self.driver.close()
            raise PeerError(f"UCX cannot be started: {error}") from error

    async def allocate(self, size: int) -> UcpMemory:
        """The region's memory, once. Raises PeerError where there is not enough."""
        try:
            self._memory = await self.driver.allocate(size)
        except UcpError as error:
            raise PeerError(f"UCX cannot allocate {size} bytes: {error}") from error
        return self._memory

    def listen(self, on_message: OnMessage, on_endpoint_lost: OnEndpointLost) -> None:
        self._on_message = on_message
        self._on_endpoint_lost = on_endpoint_lost

    def _deliver(self, message_id: int, header: bytes, payload: bytes | Rendezvous) -> None:
        if self._on_message is not None:
            self._on_message(message_id, header, payload)
        elif isinstance(payload, Rendezvous):
            self.driver.drop(payload)

    def _lost(self, endpoint: int) -> None:
        self.endpoints.lost(endpoint)
        if self._on_endpoint_lost is not None:
            self._on_endpoint_lost(endpoint)

    async def broken(self) -> str:
        """Why UCX moves nothing any more; waits for as long as it does."""
        return await asyncio.shield(self.driver.broke)

    async def close(self) -> None:
        """The region's memory goes here: nobody may use it any more."""
        if self._memory is not None:
            await self.driver.free(self._memory)
            self._memory = None
        await self.driver.close()
