"""The tier for where libucp is missing: a pull's blocks packed into messages over a TCP connection of its own.

The data connection proves the offer's secret in both directions; the secret itself came over the authenticated control
connection. The client computes every size from its own request. Bytes arrive in a staging buffer and are copied to their
landing blocks by the copy thread, so a pull that is cancelled while bytes are on their way costs a new connection, no more.
"""

import asyncio
import secrets
from collections.abc import Sequence

from common.adapters.kv_checksum import view_of
from common.adapters.kv_copying import packed_blocks
from common.adapters.kv_messages import FetchRequest, TcpOffer, decode, encode
from common.adapters.kv_staging import STATUS_AREA_BYTES, StagingBuffer, StagingPool
from common.adapters.kv_tier import LocalPool, MessagePuller, PeerShape, TierLink
from common.adapters.tcp_server import DATA_PURPOSE, LENGTH, TcpKvServer
from common.adapters.tcp_stream import TcpStream
from common.ports.kv_transport import BlockSource, PullOutcome, Tier
from common.values.errors import PeerError
from common.values.ids import ReservationId


class TcpTier:
    """Serves over TCP and connects to others that do."""

    tier: Tier = "tcp"

    def __init__(self, pool: LocalPool, host: str, port: int = 0) -> None:
        self._pool = pool
        self._host = host
        self._port = port
        self._secret = secrets.token_bytes(32)
        self._server = TcpKvServer(pool, self._secret)
        self._staging = pool.staging()

    @property
    def strangers(self) -> int:
        return self._server.strangers

    async def start(self) -> None:
        await self._server.start(self._host, self._port)

    def offer(self) -> bytes:
        return encode(TcpOffer(host=self._host, port=self._server.port, secret=self._secret))

    async def connect(self, shape: PeerShape, offer: bytes) -> TierLink:
        link = TcpLink(self._pool, self._staging, decode(offer, TcpOffer))
        await link.open()
        return link

    async def close(self) -> None:
        """Links are closed before."""
        await self._server.close()
        self._staging.close()


class TcpLink:
    """One data connection to a peer; it is opened again when a cancelled pull had to break it."""

    tier: Tier = "tcp"

    def __init__(self, pool: LocalPool, staging: StagingPool, offer: TcpOffer) -> None:
        self._pool = pool
        self._offer = offer
        self._puller = MessagePuller("tcp", pool, staging, self._fetch)
        self._stream: TcpStream | None = None
        self._turn = asyncio.Lock()
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    async def open(self) -> TcpStream:
        """Raises PeerError where the peer cannot be reached or does not know the secret."""
        if self._closed:
            raise PeerError("the link is closed")
        if self._stream is None:
            self._stream = await self._dial()
        return self._stream

    async def _dial(self) -> TcpStream:
        stream: TcpStream | None = None
        try:
            async with asyncio.timeout(self._pool.connect_timeout_s):
                stream = await TcpStream.dial(self._offer.host, self._offer.port)
                await stream.handshake(self._offer.secret, "client", DATA_PURPOSE)
                return stream
        except BaseException as error:
            if stream is not None:
                stream.close()
            if isinstance(error, OSError):
                raise PeerError(f"no data connection to {self._offer.host}:{self._offer.port}: {error!r}") from error
            raise

    async def pull(self, reservation: ReservationId, blocks: Sequence[BlockSource]) -> list[PullOutcome]:
        return await self._puller.pull(reservation, blocks)

    async def _fetch(self, request: FetchRequest, buffer: StagingBuffer) -> bytes:
        async with self._turn:
            stream = await self.open()
            whole = False
            try:
                async with asyncio.timeout(self._pool.stall_timeout_s):
                    statuses = await self._exchange(stream, request, buffer)
                whole = True
                return statuses
            except TimeoutError as error:
                raise PeerError("the peer sends nothing") from error
            finally:
                if not whole:
                    stream.close()
                    self._stream = None

    async def _exchange(self, stream: TcpStream, request: FetchRequest, buffer: StagingBuffer) -> bytes:
        payload = encode(request)
        await stream.send(LENGTH.pack(len(payload)) + payload)
        (count,) = LENGTH.unpack(await stream.read(LENGTH.size))
        if count != len(request.blocks):
            raise PeerError(f"{count} statuses for {len(request.blocks)} blocks")
        statuses = bytes(await stream.read(count))
        size = packed_blocks(statuses) * self._pool.region.layout.block_bytes
        await stream.read_into(view_of(buffer.address + STATUS_AREA_BYTES, size))
        return statuses

    async def close(self) -> None:
        """A pull that is under way ends with "lost"."""
        self._closed = True
        if self._stream is not None:
            self._stream.end()
        async with self._turn:
            if self._stream is not None:
                self._stream.close()
                self._stream = None
