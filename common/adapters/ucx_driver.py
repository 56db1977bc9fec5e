"""The thread in which UCX lives, and the event loop's way into it.

On the tiers that send messages, progress copies bytes, so it has a thread of its own. The thread sleeps in poll() on UCX's
event fd and on a wake-up fd of ours, and costs nothing while nothing happens. All calls of libucp are made here; the event
loop hands in commands and gets futures; messages and lost endpoints are delivered back on the loop. No decision is taken in
this file.
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from common.adapters.ucp_library import IN_PROGRESS, OK, UcpError, UcpMemory, UcpWorker
from common.values.errors import PeerError

logger = logging.getLogger(__name__)

T = TypeVar("T")
STATUS_CANCELLED = -16
STATUS_NOT_CONNECTED = -24
MAX_EAGER_BYTES = 128 << 10
MAX_UNDELIVERED = 4096
CLOSE_TIMEOUT_S = 0.5
MESSAGE_IDS = (1, 2, 3, 4, 5)


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """A message whose bytes are still at the peer. Exactly one of `receive` and `drop` has to follow."""

    descriptor: int
    length: int


OnMessage = Callable[[int, bytes, bytes | Rendezvous], None]
OnEndpointLost = Callable[[int], None]


class UcxDriver:
    """Start it once, close it once. Endpoints are named by small numbers of ours, which are never reused. `broke` is done, with the
    reason, should the thread end of itself: nothing is moved any more, and who uses this has to be replaced."""

    def __init__(self, library: ctypes.CDLL, on_message: OnMessage, on_endpoint_lost: OnEndpointLost) -> None:
        self._library = library
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._on_endpoint_lost = on_endpoint_lost
        self._commands: deque[Callable[[UcpWorker], None]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self._broken: str | None = None
        self._thread: threading.Thread | None = None
        self.broke: asyncio.Future[str] = self._loop.create_future()
        self._undelivered = 0
        self.dropped_messages = 0
        # The rest belongs to the thread.
        self._watched: dict[int, tuple[Callable[[int], None], object]] = {}
        self._endpoints: dict[int, int] = {}
        self._failed_handles: list[int] = []
        self._last_endpoint = 0

    # ------------------------------------------------------------------------------------------ on the event loop

    async def start(self) -> None:
        """Raises UcpError where UCX cannot be brought up."""
        started: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="ucx", daemon=True)
        self._thread.start()
        await started

    async def call(self, work: Callable[[UcpWorker], T]) -> T:
        """`work(worker)` in the thread. Not to be cancelled half-way: what it made is handed over or the driver is closed."""
        done: asyncio.Future[T] = self._loop.create_future()

        def command(worker: UcpWorker) -> None:
            try:
                result = work(worker)
            except UcpError as error:
                self._post(_fail, done, error)
            else:
                self._post(_resolve, done, result)

        self._submit(command)
        return await done

    async def connect(self, worker_address: bytes) -> int:
        def connect(worker: UcpWorker) -> int:
            self._last_endpoint += 1
            self._endpoints[self._last_endpoint] = worker.connect(worker_address)
            return self._last_endpoint

        return await self.call(connect)

    def close_endpoint(self, endpoint: int) -> None:
        def close(worker: UcpWorker) -> None:
            handle = self._endpoints.pop(endpoint, None)
            if handle is not None:
                self._watch(worker.close_endpoint(handle, force=False), _ignore)

        if self._running:
            self._submit(close)

    async def map_remote(self, endpoint: int, remote_key: bytes, remote_address: int) -> tuple[int, int]:
        def map_remote(worker: UcpWorker) -> tuple[int, int]:
            handle = self._endpoints.get(endpoint)
            if handle is None:
                raise UcpError("ucp_ep_rkey_unpack", STATUS_NOT_CONNECTED)
            return worker.map_remote(handle, remote_key, remote_address)

        return await self.call(map_remote)

    async def unmap_remote(self, key: int) -> None:
        if self._running:
            await self.call(lambda worker: worker.unmap_remote(key))

    async def allocate(self, size: int) -> UcpMemory:
        return await self.call(lambda worker: worker.allocate(size))

    async def free(self, memory: UcpMemory) -> None:
        if self._running:
            await self.call(lambda worker: worker.free(memory))

    def send(self, endpoint: int, message_id: int, header: bytes, payload: bytes) -> asyncio.Future[int]:
        """A short message. The future holds its status; nobody has to wait for it."""
        return self._send(endpoint, message_id, header, _address_of(payload), len(payload), payload, rendezvous=False)

    def send_buffer(self, endpoint: int, message_id: int, header: bytes, address: int, length: int) -> asyncio.Future[int]:
        """A long message out of a buffer that stays as it is until the future is done."""
        return self._send(endpoint, message_id, header, address, length, None, rendezvous=True)

    def _send(
        self, endpoint: int, message_id: int, header: bytes, address: int, length: int, keep: object, *, rendezvous: bool
    ) -> asyncio.Future[int]:
        done: asyncio.Future[int] = self._loop.create_future()
        if self._broken is not None:
            done.set_result(STATUS_NOT_CONNECTED)
            return done

        def command(worker: UcpWorker) -> None:
            handle = self._endpoints.get(endpoint)
            if handle is None:
                self._post(_resolve, done, STATUS_NOT_CONNECTED)
                return
            try:
                request = worker.send(handle, message_id, header, address, length, rendezvous=rendezvous)
            except UcpError as error:
                self._post(_resolve, done, error.status)
                return
            self._watch(request, lambda status: self._post(_resolve, done, status), (header, keep))

        self._submit(command)
        return done

    def receive(self, message: Rendezvous, address: int) -> asyncio.Future[int]:
        """Fetch the message's bytes to `address`, where its length fits. Until the future is done, UCX may write there."""
        done: asyncio.Future[int] = self._loop.create_future()

        def command(worker: UcpWorker) -> None:
            try:
                request = worker.receive(message.descriptor, address, message.length)
            except UcpError as error:
                self._post(_resolve, done, error.status)
                return
            self._watch(request, lambda status: self._post(_resolve, done, status))

        self._submit(command)
        return done

    def drop(self, message: Rendezvous) -> None:
        if self._running:
            self._submit(lambda worker: worker.drop(message.descriptor))

    async def close(self) -> None:
        """Close endpoints, bounded in time, and end the thread. All memory and mappings have been given back before."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stopping = True
            self._wake()
            await asyncio.get_running_loop().run_in_executor(None, thread.join)
        if self._wake_fd >= 0:
            os.close(self._wake_fd)
            self._wake_fd = -1

    @property
    def _running(self) -> bool:
        return self._thread is not None and self._broken is None

    def _submit(self, command: Callable[[UcpWorker], None]) -> None:
        if not self._running:
            raise PeerError(f"UCX is not running: {self._broken or 'closed'}")
        self._commands.append(command)
        self._wake()

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def _deliver(self, message_id: int, header: bytes, payload: bytes | Rendezvous) -> None:
        self._undelivered -= 1
        self._on_message(message_id, header, payload)

    # ------------------------------------------------------------------------------------------ in the thread

    def _run(self, started: asyncio.Future[None]) -> None:
        try:
            worker = UcpWorker(self._library, lambda handle, _status: self._failed_handles.append(handle))
            poller = select.poll()
            poller.register(worker.event_fd(), select.POLLIN)
            poller.register(self._wake_fd, select.POLLIN)
            for message_id in MESSAGE_IDS:
                worker.handle_messages(message_id, self._acceptor(message_id))
        except UcpError as error:
            self._broken = str(error)
            self._post(_fail, started, error)
            return
        self._post(_resolve, started, None)
        try:
            while not self._stopping:
                self._turn(worker, poller)
        except Exception as error:  # whatever it is: with this thread silent, every transfer would wait for ever
            logger.exception("ucx_thread_broken")
            self._broken = str(error) or type(error).__name__
            for endpoint in self._endpoints:
                self._post(self._on_endpoint_lost, endpoint)
            self._post(_resolve, self.broke, self._broken)
            self._give_up(worker)
            return
        self._shut_down(worker)

    def _turn(self, worker: UcpWorker, poller: select.poll) -> None:
        """One round: commands, progress, what came of it; then sleep if there is nothing to do."""
        while self._commands:
            self._commands.popleft()(worker)
        active = worker.progress()
        self._finish_requests(worker)
        self._close_failed(worker)
        if not active and not self._commands and worker.arm():
            poller.poll()
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)

    def _acceptor(self, message_id: int) -> Callable[[bytes, int, int, bool], bool]:
        def accept(header: bytes, data: int, length: int, rendezvous: bool) -> bool:
            if self._undelivered >= MAX_UNDELIVERED or (not rendezvous and length > MAX_EAGER_BYTES):
                self.dropped_messages += 1
                return False
            payload = Rendezvous(data, length) if rendezvous else ctypes.string_at(data, length)
            self._undelivered += 1
            self._post(self._deliver, message_id, header, payload)
            return rendezvous

        return accept

    def _watch(self, request: int | None, on_done: Callable[[int], None], keep: object = None) -> None:
        if request is None:
            on_done(OK)
        else:
            self._watched[request] = (on_done, keep)

    def _finish_requests(self, worker: UcpWorker) -> None:
        for request in list(self._watched):
            status = worker.status(request)
            if status != IN_PROGRESS:
                on_done, _ = self._watched.pop(request)
                worker.forget(request)
                on_done(status)

    def _close_failed(self, worker: UcpWorker) -> None:
        """A failed endpoint is closed from here, never from its own callback."""
        while self._failed_handles:
            handle = self._failed_handles.pop()
            endpoint = next((number for number, open_handle in self._endpoints.items() if open_handle == handle), None)
            if endpoint is not None:
                del self._endpoints[endpoint]
                self._watch(worker.close_endpoint(handle, force=True), _ignore)
                self._post(self._on_endpoint_lost, endpoint)

    def _shut_down(self, worker: UcpWorker) -> None:
        """Close every endpoint, wait a little for what is under way, then take the worker down."""
        while self._commands:
            self._commands.popleft()(worker)
        for request in self._watched:
            worker.cancel(request)
        for handle in self._endpoints.values():
            self._watch(worker.close_endpoint(handle, force=True), _ignore)
        self._endpoints.clear()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        while self._watched and time.monotonic() < deadline:
            worker.progress()
            self._finish_requests(worker)
        for on_done, _ in self._watched.values():
            on_done(STATUS_CANCELLED)
        self._watched.clear()
        worker.destroy()

    def _give_up(self, worker: UcpWorker) -> None:
        """Nobody may wait for this thread; but the library and its memory, which the engine still uses, stay as they are."""
        while self._commands:
            with contextlib.suppress(UcpError):
                self._commands.popleft()(worker)
        for on_done, _ in self._watched.values():
            on_done(STATUS_CANCELLED)
        self._watched.clear()

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        """On the event loop, unless that is closed already."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)


def _address_of(payload: bytes) -> int:
    return ctypes.cast(ctypes.c_char_p(payload), ctypes.c_void_p).value or 0


def _resolve(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[T], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def _ignore(_status: int) -> None:
    """For requests that nobody waits for."""
