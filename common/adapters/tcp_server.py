"""Serves this worker's granted blocks to whoever proves the offer's secret on a data connection.

Reply: u32 number of statuses, the statuses, then the packed blocks, as many as the statuses say.
"""

import asyncio
import logging
import socket
import struct

from common.adapters.kv_checksum import view_of
from common.adapters.kv_copying import pack_blocks, packed_blocks
from common.adapters.kv_messages import MAX_REQUEST_BYTES, FetchRequest, blocks_per_message, decode_fetch
from common.adapters.kv_serving import ServingTask
from common.adapters.kv_staging import STATUS_AREA_BYTES, StagingPool
from common.adapters.kv_tier import LocalPool
from common.adapters.tcp_stream import SOCKET_BUFFER_BYTES, TcpStream
from common.values.errors import PeerError
from common.values.ids import ReservationId

LENGTH = struct.Struct("<I")
DATA_PURPOSE = "segue kv data 1"
MAX_CONNECTIONS = 256
ACCEPT_PAUSE_S = 0.1


class TcpKvServer:
    """Listens from `start` to `close`. `strangers` counts connections that did not know the secret or broke the protocol."""

    def __init__(self, pool: LocalPool, secret: bytes) -> None:
        self._pool = pool
        self._secret = secret
        self._staging: StagingPool = pool.staging()
        self._places = asyncio.Semaphore(MAX_CONNECTIONS)
        self._serving: ServingTask | None = None
        self.strangers = 0
        self.port = 0

    async def start(self, host: str, port: int) -> None:
        """Raises OSError where the address cannot be bound."""
        infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        listener = socket.create_server(infos[0][4][:2], family=infos[0][0], backlog=MAX_CONNECTIONS)
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        self.port = listener.getsockname()[1]
        self._serving = ServingTask(self._serve(listener), "kv tcp server")

    async def _serve(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    await self._places.acquire()
                    try:
                        connection, _ = await loop.sock_accept(listener)
                    except OSError as error:
                        self._places.release()
                        logging.getLogger(__name__).error("kv data connection not accepted", extra={"reason": str(error)})
                        await asyncio.sleep(ACCEPT_PAUSE_S)
                        continue
                    group.create_task(self._serve_connection(TcpStream(connection)))
        finally:
            listener.close()

    async def _serve_connection(self, stream: TcpStream) -> None:
        try:
            async with asyncio.timeout(self._pool.connect_timeout_s):
                await stream.handshake(self._secret, "server", DATA_PURPOSE)
        except (PeerError, OSError):
            self.strangers += 1
            stream.close()
            self._places.release()
            return
        try:
            while True:
                await self._answer(stream, await self._read_request(stream))
        except (PeerError, OSError) as error:
            logging.getLogger(__name__).info("kv data connection ended: %s", error)
        finally:
            stream.close()
            self._places.release()

    async def _read_request(self, stream: TcpStream) -> FetchRequest:
        (size,) = LENGTH.unpack(await stream.read(LENGTH.size))
        if size > MAX_REQUEST_BYTES:
            raise PeerError(f"a request of {size} bytes")
        request = decode_fetch(await stream.read(size))
        if len(request.blocks) > blocks_per_message(self._pool.region.layout):
            raise PeerError("more blocks than a message carries")
        return request

    async def _answer(self, stream: TcpStream, request: FetchRequest) -> None:
        pool = self._pool
        buffer = await self._staging.acquire()
        try:
            granted = pool.grants.granted(ReservationId(request.reservation))
            place = buffer.address + STATUS_AREA_BYTES
            statuses = await pool.copies.run(lambda: pack_blocks(pool.region, granted, request.blocks, request.generations, place))
            async with asyncio.timeout(pool.stall_timeout_s):
                await stream.send(LENGTH.pack(len(statuses)) + statuses)
                await stream.send(view_of(place, packed_blocks(statuses) * pool.region.layout.block_bytes))
        finally:
            buffer.release()

    async def close(self) -> None:
        if self._serving is not None:
            await self._serving.stop()
            self._serving = None
        self._staging.close()
