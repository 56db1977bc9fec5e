"""One UCX endpoint per peer for life, whoever needs it: our links to the peer, and its links to us.

Endpoints that are made again and again leak inside UCX, and two that cross over confuse its wire-up; so links share one,
counted, and it is closed with its last user.
"""

import asyncio

from common.adapters.ucp_library import UcpError
from common.adapters.ucx_driver import UcxDriver
from common.values.errors import PeerError


class UcxEndpoints:
    """Peer identity → endpoint and its number of users."""

    def __init__(self, driver: UcxDriver) -> None:
        self._driver = driver
        self._open: dict[bytes, int] = {}
        self._users: dict[bytes, int] = {}
        self._lock = asyncio.Lock()
        self._lost_while_made: set[int] = set()

    def endpoint(self, peer: bytes) -> int | None:
        return self._open.get(peer)

    async def acquire(self, peer: bytes, worker_address: bytes) -> int:
        """The peer's endpoint, made if need be; pair it with `release`. Raises PeerError."""
        async with self._lock:
            if peer not in self._open:
                self._open[peer] = await self._connect(worker_address)
            self._users[peer] = self._users.get(peer, 0) + 1
            return self._open[peer]

    def release(self, peer: bytes, endpoint: int) -> None:
        """Once for each `acquire`. Releasing an endpoint that was lost meanwhile is harmless."""
        if self._open.get(peer) != endpoint:
            return
        users = self._users[peer] - 1
        if users > 0:
            self._users[peer] = users
            return
        del self._users[peer], self._open[peer]
        self._driver.close_endpoint(endpoint)

    def lost(self, endpoint: int) -> bytes | None:
        """The driver closed a failed endpoint; returns whose it was."""
        peer = next((peer for peer, number in self._open.items() if number == endpoint), None)
        if peer is None and self._lock.locked():
            self._lost_while_made.add(endpoint)
        if peer is not None:
            del self._open[peer]
            self._users.pop(peer, None)
        return peer

    async def _connect(self, worker_address: bytes) -> int:
        self._lost_while_made.clear()
        try:
            endpoint = await self._driver.connect(worker_address)
        except UcpError as error:
            raise PeerError(f"no UCX endpoint to the peer: {error}") from error
        if endpoint in self._lost_while_made:
            raise PeerError("the peer was lost at once")
        return endpoint
