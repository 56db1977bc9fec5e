"""The tier of two-sided messages over UCX: RDMA where the library has it, else its TCP or shared memory.

A link says hello once, signed with the secret of the peer's offer, and gets a welcome; then each message is one signed fetch
and one rendezvous of packed blocks into a staging buffer of ours, whose length we have computed from our own request before
a byte moves. One endpoint a peer, for life. A dead peer is noticed by UCX's keepalive, a frozen one by the stall time-out.
"""

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.adapters.kv_checksum import view_of
from common.adapters.kv_copying import packed_blocks
from common.adapters.kv_messages import FetchRequest, UcxBye, UcxFetch, UcxHello, UcxOffer, UcxWelcome, decode, encode
from common.adapters.kv_staging import STATUS_AREA_BYTES, StagingBuffer
from common.adapters.kv_tier import LocalPool, MessagePuller, PeerShape, TierLink
from common.adapters.ucp_library import OK
from common.adapters.ucx_driver import Rendezvous
from common.adapters.ucx_runtime import UcxRuntime
from common.adapters.ucx_server import BYE, FETCH, HELLO, REPLY, WELCOME, UcxKvServer, check_signature, sign
from common.ports.kv_transport import BlockSource, PullOutcome, Tier
from common.values.errors import PeerError
from common.values.ids import ReservationId


@dataclass(slots=True, kw_only=True)
class _Fetch:
    """A message that we wait for: who sends it, where it may land, and how it ended."""

    endpoint: int
    buffer: StagingBuffer
    largest: int
    received: asyncio.Future[int]
    """The length of the message."""


class UcxTier:
    """Serves over UCX and connects to others that do."""

    tier: Tier = "ucx"

    def __init__(self, pool: LocalPool, runtime: UcxRuntime) -> None:
        self._pool = pool
        self._runtime = runtime
        self._secret = secrets.token_bytes(32)
        self._server = UcxKvServer(pool, runtime.driver, runtime.endpoints, self._secret)
        self._staging = pool.staging()
        self._fetches: dict[bytes, _Fetch] = {}
        self._welcomes: dict[bytes, asyncio.Future[tuple[bytes, bytes, UcxWelcome]]] = {}

    @property
    def strangers(self) -> int:
        return self._server.strangers

    def start(self) -> None:
        self._runtime.listen(self._on_message, self._on_endpoint_lost)
        self._server.start()

    def offer(self) -> bytes:
        return encode(UcxOffer(worker_address=self._runtime.worker_address, secret=self._secret))

    async def connect(self, shape: PeerShape, offer: bytes) -> TierLink:
        there = decode(offer, UcxOffer)
        endpoint = await self._runtime.endpoints.acquire(shape.identity, there.worker_address)
        try:
            async with asyncio.timeout(self._pool.connect_timeout_s):
                key = await self._say_hello(endpoint, there.secret)
        except BaseException as error:
            self._runtime.endpoints.release(shape.identity, endpoint)
            if isinstance(error, TimeoutError):
                raise PeerError("the peer's UCX does not answer") from error
            raise
        return UcxLink(self, self._pool, shape.identity, endpoint, key)

    async def _say_hello(self, endpoint: int, secret: bytes) -> bytes:
        """Returns the key that requests are signed with."""
        hello = UcxHello(client=self._pool.identity, worker_address=self._runtime.worker_address, nonce=secrets.token_bytes(32))
        answer: asyncio.Future[tuple[bytes, bytes, UcxWelcome]] = asyncio.get_running_loop().create_future()
        self._welcomes[hello.nonce] = answer
        try:
            body = encode(hello)
            sent = self._runtime.driver.send(endpoint, HELLO, sign(secret, b"hello", body), body)
            sent.add_done_callback(lambda status: _fail_unsent(status, answer))
            signature, welcome_body, welcome = await answer
        finally:
            del self._welcomes[hello.nonce]
        key = sign(secret, b"session", hello.nonce + welcome.server_nonce)
        check_signature(key, b"welcome", welcome_body, signature)
        return key

    def puller(self, link: "UcxLink") -> MessagePuller:
        return MessagePuller("ucx", self._pool, self._staging, link.fetch)

    async def fetch(self, endpoint: int, key: bytes, request: FetchRequest, buffer: StagingBuffer) -> bytes:
        """One message. When this ends early, a receive that has begun keeps the buffer until it is over."""
        token = secrets.token_bytes(16)
        body = encode(UcxFetch(client=self._pool.identity, token=token, request=request))
        block_bytes = self._pool.region.layout.block_bytes
        waiting = _Fetch(
            endpoint=endpoint,
            buffer=buffer,
            largest=STATUS_AREA_BYTES + len(request.blocks) * block_bytes,
            received=asyncio.get_running_loop().create_future(),
        )
        self._fetches[token] = waiting
        try:
            sent = self._runtime.driver.send(endpoint, FETCH, sign(key, b"fetch", body), body)
            sent.add_done_callback(lambda status: _fail_unsent(status, waiting.received))
            async with asyncio.timeout(self._pool.stall_timeout_s):
                length = await waiting.received
        except TimeoutError as error:
            raise PeerError("the peer sends nothing") from error
        finally:
            del self._fetches[token]
        statuses = bytes(view_of(buffer.address, len(request.blocks)))
        if length != STATUS_AREA_BYTES + packed_blocks(statuses) * block_bytes:
            raise PeerError("the message is not as long as its statuses say")
        return statuses

    def say_bye(self, endpoint: int, key: bytes) -> None:
        body = encode(UcxBye(client=self._pool.identity, token=secrets.token_bytes(16)))
        self._runtime.driver.send(endpoint, BYE, sign(key, b"bye", body), body)

    def release(self, peer: bytes, endpoint: int) -> None:
        self._runtime.endpoints.release(peer, endpoint)
        self._end_fetches(endpoint)

    def _on_message(self, message_id: int, header: bytes, payload: bytes | Rendezvous) -> None:
        if isinstance(payload, Rendezvous):
            self._on_reply(message_id, header, payload)
        elif message_id == WELCOME:
            self._on_welcome(header, payload)
        else:
            self._server.handle(message_id, header, payload)

    def _on_welcome(self, signature: bytes, body: bytes) -> None:
        try:
            welcome = decode(body, UcxWelcome)
        except PeerError:
            self._server.strangers += 1
            return
        answer = self._welcomes.get(welcome.nonce)
        if answer is not None and not answer.done():
            answer.set_result((signature, body, welcome))

    def _on_reply(self, message_id: int, token: bytes, message: Rendezvous) -> None:
        waiting = self._fetches.get(token)
        fits = waiting is not None and STATUS_AREA_BYTES <= message.length <= waiting.largest
        if message_id != REPLY or waiting is None or not fits or waiting.received.done():
            self._runtime.driver.drop(message)
            return
        buffer = waiting.buffer
        buffer.hold()

        def finished(status: asyncio.Future[int]) -> None:
            buffer.release()
            if not waiting.received.done():
                if status.result() == OK:
                    waiting.received.set_result(message.length)
                else:
                    waiting.received.set_exception(PeerError(f"the transfer failed with UCX status {status.result()}"))

        self._runtime.driver.receive(message, buffer.address).add_done_callback(finished)

    def _on_endpoint_lost(self, endpoint: int) -> None:
        self._server.lost(endpoint)
        self._end_fetches(endpoint)

    def _end_fetches(self, endpoint: int) -> None:
        for waiting in self._fetches.values():
            if waiting.endpoint == endpoint and not waiting.received.done():
                waiting.received.set_exception(PeerError("the peer is lost"))

    async def close(self) -> None:
        await self._server.stop()

    def free(self) -> None:
        """After UCX is down: nothing reads or writes the buffers any more."""
        self._server.close()
        self._staging.close()


class UcxLink:
    """A peer that welcomed us."""

    tier: Tier = "ucx"

    def __init__(self, owner: UcxTier, pool: LocalPool, peer: bytes, endpoint: int, key: bytes) -> None:
        self._owner = owner
        self._peer = peer
        self._endpoint = endpoint
        self._key = key
        self._closed = False
        self._puller = owner.puller(self)

    @property
    def closed(self) -> bool:
        return self._closed

    async def pull(self, reservation: ReservationId, blocks: Sequence[BlockSource]) -> list[PullOutcome]:
        return await self._puller.pull(reservation, blocks)

    async def fetch(self, request: FetchRequest, buffer: StagingBuffer) -> bytes:
        if self._closed:
            raise PeerError("the link is closed")
        return await self._owner.fetch(self._endpoint, self._key, request, buffer)

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._owner.say_bye(self._endpoint, self._key)
            self._owner.release(self._peer, self._endpoint)


def _fail_unsent(sent: asyncio.Future[int], waiting: asyncio.Future[Any]) -> None:
    """A request that did not go out gets no answer."""
    if sent.result() != OK and not waiting.done():
        waiting.set_exception(PeerError(f"the request could not be sent: UCX status {sent.result()}"))
