"""Serves this worker's granted blocks to peers over UCX active messages.

Anybody can send to a UCX worker, so nothing is believed: a hello proves the secret of our offer and names the client's own
worker address, requests are signed with the key that follows from it, and replies go to the endpoint made from the hello
alone. What does not fit is counted and dropped.
"""

import asyncio
import hashlib
import hmac
import secrets
from dataclasses import dataclass

from common.adapters.kv_checksum import view_of
from common.adapters.kv_copying import pack_blocks, packed_blocks
from common.adapters.kv_messages import UcxBye, UcxFetch, UcxHello, UcxWelcome, blocks_per_message, check_fetch, decode, encode
from common.adapters.kv_serving import ServingTask
from common.adapters.kv_staging import STATUS_AREA_BYTES, StagingPool
from common.adapters.kv_tier import STAGING_BUFFERS, LocalPool
from common.adapters.ucx_driver import UcxDriver
from common.adapters.ucx_endpoints import UcxEndpoints
from common.values.errors import PeerError
from common.values.ids import ReservationId

HELLO, WELCOME, FETCH, REPLY, BYE = 1, 2, 3, 4, 5
MAX_WAITING_FETCHES = 256
SIGNATURE_BYTES = 32


def sign(key: bytes, purpose: bytes, body: bytes) -> bytes:
    return hmac.new(key, b"segue ucx 1 " + purpose + b"\0" + body, hashlib.sha256).digest()


def check_signature(key: bytes, purpose: bytes, body: bytes, signature: bytes) -> None:
    if not hmac.compare_digest(sign(key, purpose, body), signature):
        raise PeerError("a UCX message is not signed as it should be")


@dataclass(frozen=True, slots=True, kw_only=True)
class UcxClient:
    """A peer that said hello: its endpoint, and the key that its requests are signed with."""

    endpoint: int
    key: bytes


class UcxKvServer:
    """`handle` takes what the driver delivers; `strangers` counts what was not signed, not granted a place, or malformed."""

    def __init__(self, pool: LocalPool, driver: UcxDriver, endpoints: UcxEndpoints, secret: bytes) -> None:
        self._pool = pool
        self._driver = driver
        self._endpoints = endpoints
        self._secret = secret
        self._staging: StagingPool = pool.staging()
        self._clients: dict[bytes, UcxClient] = {}
        self._fetches: asyncio.Queue[UcxFetch] = asyncio.Queue(MAX_WAITING_FETCHES)
        self._hellos: asyncio.Queue[UcxHello] = asyncio.Queue(MAX_WAITING_FETCHES)
        self._serving: ServingTask | None = None
        self.strangers = 0

    def start(self) -> None:
        self._serving = ServingTask(self._serve(), "kv ucx server")

    def handle(self, message_id: int, signature: bytes, body: bytes) -> None:
        """A hello, a fetch or a bye. Synchronous: what takes time is queued."""
        try:
            if message_id == HELLO:
                check_signature(self._secret, b"hello", body, signature)
                self._hellos.put_nowait(decode(body, UcxHello))
            elif message_id == FETCH:
                self._fetches.put_nowait(self._check_fetch(body, signature))
            elif message_id == BYE:
                self._forget(decode(body, UcxBye), body, signature)
        except (PeerError, asyncio.QueueFull):
            self.strangers += 1

    def lost(self, endpoint: int) -> None:
        """The driver has closed this endpoint."""
        self._clients = {identity: client for identity, client in self._clients.items() if client.endpoint != endpoint}

    def _check_fetch(self, body: bytes, signature: bytes) -> UcxFetch:
        fetch = decode(body, UcxFetch)
        client = self._clients.get(fetch.client)
        if client is None:
            raise PeerError("a fetch before its hello")
        check_signature(client.key, b"fetch", body, signature)
        check_fetch(fetch.request)
        if len(fetch.request.blocks) > blocks_per_message(self._pool.region.layout):
            raise PeerError("more blocks than a message carries")
        return fetch

    def _forget(self, bye: UcxBye, body: bytes, signature: bytes) -> None:
        client = self._clients.get(bye.client)
        if client is not None:
            check_signature(client.key, b"bye", body, signature)
            del self._clients[bye.client]
            self._endpoints.release(bye.client, client.endpoint)

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._welcome_clients())
            for _ in range(STAGING_BUFFERS):
                group.create_task(self._answer_fetches())

    async def _welcome_clients(self) -> None:
        while True:
            hello = await self._hellos.get()
            try:
                endpoint = await self._endpoints.acquire(hello.client, hello.worker_address)
                former = self._clients.get(hello.client)
                if former is not None:
                    self._endpoints.release(hello.client, former.endpoint)
                server_nonce = secrets.token_bytes(32)
                key = sign(self._secret, b"session", hello.nonce + server_nonce)
                self._clients[hello.client] = UcxClient(endpoint=endpoint, key=key)
                body = encode(UcxWelcome(nonce=hello.nonce, server_nonce=server_nonce))
                self._driver.send(endpoint, WELCOME, sign(key, b"welcome", body), body)
            except PeerError:
                self.strangers += 1

    async def _answer_fetches(self) -> None:
        while True:
            fetch = await self._fetches.get()
            try:
                await self._answer(fetch)
            except PeerError:
                self._clients.pop(fetch.client, None)

    async def _answer(self, fetch: UcxFetch) -> None:
        pool, request = self._pool, fetch.request
        client = self._clients.get(fetch.client)
        if client is None:
            return
        granted = pool.grants.granted(ReservationId(request.reservation))
        buffer = await self._staging.acquire()
        try:
            place = buffer.address + STATUS_AREA_BYTES
            statuses = await pool.copies.run(lambda: pack_blocks(pool.region, granted, request.blocks, request.generations, place))
            view_of(buffer.address, len(statuses))[:] = statuses
            length = STATUS_AREA_BYTES + packed_blocks(statuses) * pool.region.layout.block_bytes
            sent = self._driver.send_buffer(client.endpoint, REPLY, fetch.token, buffer.address, length)
            buffer.hold()
            sent.add_done_callback(lambda _: buffer.release())
            await sent
        finally:
            buffer.release()

    async def stop(self) -> None:
        """End the tasks. The staging buffers are freed by `close`, once UCX is down and cannot read them any more."""
        if self._serving is not None:
            await self._serving.stop()
            self._serving = None

    def close(self) -> None:
        self._staging.close()
