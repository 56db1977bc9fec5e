"""The one binding of libucp, by ctypes: exactly the calls that the transports need, with UCX's errors as UcpError.

Where the library comes from: the file named by `SEGUE_UCX_LIBRARY`, else the `libucx` package, else the system's `libucp.so.0`.

Never asked for: `UCP_FEATURE_RMA`. Over tcp and shared memory UCX emulates it in software that ignores the key, so any peer
could read and write any address. Features are AM, TAG and WAKEUP. The structs are those of API 1.11, which later releases
extend only at their ends, behind field masks; `ucp_init_version` is told so.

Everything here belongs to the one thread that made the context (UCX's single-threaded mode).
"""

import ctypes
import importlib.util
import os
from collections.abc import Callable
from ctypes import byref, c_char_p, c_int, c_int8, c_size_t, c_uint, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from common.adapters.ucp_structures import (
    ERROR_CALLBACK,
    MESSAGE_CALLBACK,
    ContextParams,
    EndpointParams,
    MemoryAttributes,
    MemoryMapParams,
    MessageHandlerParams,
    RequestParams,
    WorkerParams,
)
from common.values.errors import SegueError

OK = 0
IN_PROGRESS = 1
NO_RESOURCE = -2
NO_MEMORY = -4
BUSY = -15
_LAST_ERROR = -100
_FEATURES = 1 << 0 | 1 << 4 | 1 << 6
_API_MAJOR, _API_MINOR = 1, 11
_ERROR_MODE_PEER = 1

RECEIVE_IS_RENDEZVOUS = 1 << 17
SEND_EAGER = 1 << 1
SEND_RENDEZVOUS = 1 << 2


class UcpError(SegueError):
    """A call of libucp failed; `status` is its `ucs_status_t`."""

    def __init__(self, call: str, status: int) -> None:
        super().__init__(f"{call} failed with UCX status {status}")
        self.status = status


MessageCallback = Callable[[bytes, int, int, bool], bool]
"""(header, data, length, rendezvous) → keep. `data` is an address or, for a rendezvous, a descriptor, which lives on if kept."""

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ucp_config_read": (c_int8, c_char_p, c_char_p, c_void_p),
    "ucp_config_release": (None, c_void_p),
    "ucp_init_version": (c_int8, c_uint, c_uint, c_void_p, c_void_p, c_void_p),
    "ucp_cleanup": (None, c_void_p),
    "ucp_worker_create": (c_int8, c_void_p, c_void_p, c_void_p),
    "ucp_worker_destroy": (None, c_void_p),
    "ucp_worker_get_address": (c_int8, c_void_p, c_void_p, c_void_p),
    "ucp_worker_release_address": (None, c_void_p, c_void_p),
    "ucp_worker_get_efd": (c_int8, c_void_p, c_void_p),
    "ucp_worker_arm": (c_int8, c_void_p),
    "ucp_worker_progress": (c_uint, c_void_p),
    "ucp_worker_set_am_recv_handler": (c_int8, c_void_p, c_void_p),
    "ucp_ep_create": (c_int8, c_void_p, c_void_p, c_void_p),
    "ucp_ep_close_nbx": (c_void_p, c_void_p, c_void_p),
    "ucp_mem_map": (c_int8, c_void_p, c_void_p, c_void_p),
    "ucp_mem_query": (c_int8, c_void_p, c_void_p),
    "ucp_mem_unmap": (c_int8, c_void_p, c_void_p),
    "ucp_rkey_pack": (c_int8, c_void_p, c_void_p, c_void_p, c_void_p),
    "ucp_rkey_buffer_release": (None, c_void_p),
    "ucp_ep_rkey_unpack": (c_int8, c_void_p, c_char_p, c_void_p),
    "ucp_rkey_ptr": (c_int8, c_void_p, c_uint64, c_void_p),
    "ucp_rkey_destroy": (None, c_void_p),
    "ucp_am_send_nbx": (c_void_p, c_void_p, c_uint, c_char_p, c_size_t, c_void_p, c_size_t, c_void_p),
    "ucp_am_recv_data_nbx": (c_void_p, c_void_p, c_void_p, c_void_p, c_size_t, c_void_p),
    "ucp_am_data_release": (None, c_void_p, c_void_p),
    "ucp_request_check_status": (c_int8, c_void_p),
    "ucp_request_free": (None, c_void_p),
    "ucp_request_cancel": (None, c_void_p, c_void_p),
}


def load_libucp() -> ctypes.CDLL:
    """Load the library, with the signatures of what we call. Raises OSError, whose text says what was tried."""
    library = _open_library()
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


def _open_library() -> ctypes.CDLL:
    named = os.environ.get("SEGUE_UCX_LIBRARY")
    if named:
        return ctypes.CDLL(named)
    package = importlib.util.find_spec("libucx")
    if package is not None and package.origin is not None:
        folder = Path(package.origin).parent / "lib"
        for dependency in ("libucs.so.0", "libuct.so.0"):
            ctypes.CDLL(str(folder / dependency))
        return ctypes.CDLL(str(folder / "libucp.so.0"))
    return ctypes.CDLL("libucp.so.0")


class UcpMemory:
    """A mapped piece of memory that UCX allocated: shared with the processes of this host where it could be."""

    def __init__(self, handle: c_void_p, address: int, size: int, remote_key: bytes) -> None:
        self.handle = handle
        self.address = address
        self.size = size
        self.remote_key = remote_key


class UcpWorker:
    """One context with its one worker. Every method is called in the thread that made it, `progress` again and again."""

    def __init__(self, library: ctypes.CDLL, on_endpoint_error: Callable[[int, int], None]) -> None:
        self._library = library
        self._callbacks: list[object] = []
        self._error_callback = ERROR_CALLBACK(lambda _argument, endpoint, status: on_endpoint_error(endpoint, status))
        configuration = c_void_p()
        self._check("ucp_config_read", library.ucp_config_read(None, None, byref(configuration)))
        self._context = c_void_p()
        parameters = ContextParams(field_mask=1, features=_FEATURES)
        status = library.ucp_init_version(_API_MAJOR, _API_MINOR, byref(parameters), configuration, byref(self._context))
        library.ucp_config_release(configuration)
        self._check("ucp_init", status)
        self._worker = c_void_p()
        try:
            self._check(
                "ucp_worker_create",
                library.ucp_worker_create(self._context, byref(WorkerParams(field_mask=1)), byref(self._worker)),
            )
        except UcpError:
            library.ucp_cleanup(self._context)
            raise

    def destroy(self) -> None:
        self._library.ucp_worker_destroy(self._worker)
        self._library.ucp_cleanup(self._context)

    def event_fd(self) -> int:
        descriptor = c_int()
        self._check("ucp_worker_get_efd", self._library.ucp_worker_get_efd(self._worker, byref(descriptor)))
        return descriptor.value

    def progress(self) -> bool:
        """Move what can be moved, in this thread; whether anything was. Gives up the GIL."""
        return bool(self._library.ucp_worker_progress(self._worker))

    def arm(self) -> bool:
        """Whether the event fd will now tell of the next event; False where there are some already."""
        status = self._library.ucp_worker_arm(self._worker)
        if status not in (OK, BUSY):
            raise UcpError("ucp_worker_arm", status)
        return bool(status == OK)

    def address(self) -> bytes:
        pointer, size = c_void_p(), c_size_t()
        self._check("ucp_worker_get_address", self._library.ucp_worker_get_address(self._worker, byref(pointer), byref(size)))
        address = ctypes.string_at(pointer.value or 0, size.value)
        self._library.ucp_worker_release_address(self._worker, pointer)
        return address

    def handle_messages(self, message_id: int, callback: MessageCallback) -> None:
        """Call `callback` for each message of this id, from within `progress`."""

        def trampoline(_argument: int, header: int, header_size: int, data: int, length: int, parameters: Any) -> int:
            rendezvous = bool(parameters.contents.attributes & RECEIVE_IS_RENDEZVOUS)
            return IN_PROGRESS if callback(ctypes.string_at(header, header_size), data or 0, length, rendezvous) else OK

        function = MESSAGE_CALLBACK(trampoline)
        self._callbacks.append(function)
        parameters = MessageHandlerParams(field_mask=1 | 4, id=message_id, callback=ctypes.cast(function, c_void_p))
        self._check("ucp_worker_set_am_recv_handler", self._library.ucp_worker_set_am_recv_handler(self._worker, byref(parameters)))

    def connect(self, worker_address: bytes) -> int:
        """An endpoint whose peer's death is reported to `on_endpoint_error`."""
        buffer = ctypes.create_string_buffer(worker_address, len(worker_address))
        parameters = EndpointParams(field_mask=1 | 2 | 4, address=ctypes.addressof(buffer), error_mode=_ERROR_MODE_PEER)
        parameters.error_handler.callback = ctypes.cast(self._error_callback, c_void_p)
        endpoint = c_void_p()
        self._check("ucp_ep_create", self._library.ucp_ep_create(self._worker, byref(parameters), byref(endpoint)))
        return endpoint.value or 0

    def close_endpoint(self, endpoint: int, *, force: bool) -> int | None:
        """A request to watch, or None where it is closed already."""
        parameters = RequestParams(attribute_mask=1 << 4 if force else 0, flags=1 if force else 0)
        request = self._library.ucp_ep_close_nbx(endpoint, byref(parameters))
        return request if _is_request(request) else None

    def allocate(self, size: int) -> UcpMemory:
        """Memory that UCX allocates and registers, with the key by which a peer on this host may map it."""
        parameters = MemoryMapParams(field_mask=2 | 4, length=size, flags=1 << 1)
        handle = c_void_p()
        self._check("ucp_mem_map", self._library.ucp_mem_map(self._context, byref(parameters), byref(handle)))
        attributes = MemoryAttributes(field_mask=1 | 2)
        self._check("ucp_mem_query", self._library.ucp_mem_query(handle, byref(attributes)))
        pointer, length = c_void_p(), c_size_t()
        status = self._library.ucp_rkey_pack(self._context, handle, byref(pointer), byref(length))
        self._check("ucp_rkey_pack", status)
        remote_key = ctypes.string_at(pointer.value or 0, length.value)
        self._library.ucp_rkey_buffer_release(pointer)
        return UcpMemory(handle, attributes.address or 0, size, remote_key)

    def free(self, memory: UcpMemory) -> None:
        self._check("ucp_mem_unmap", self._library.ucp_mem_unmap(self._context, memory.handle))

    def map_remote(self, endpoint: int, remote_key: bytes, remote_address: int) -> tuple[int, int]:
        """(key, address here) of a peer's memory; raises UcpError where the two processes share none."""
        key, pointer = c_void_p(), c_void_p()
        self._check("ucp_ep_rkey_unpack", self._library.ucp_ep_rkey_unpack(endpoint, remote_key, byref(key)))
        status = self._library.ucp_rkey_ptr(key, remote_address, byref(pointer))
        if status != OK:
            self._library.ucp_rkey_destroy(key)
            raise UcpError("ucp_rkey_ptr", status)
        return key.value or 0, pointer.value or 0

    def unmap_remote(self, key: int) -> None:
        self._library.ucp_rkey_destroy(key)

    def send(self, endpoint: int, message_id: int, header: bytes, address: int, length: int, *, rendezvous: bool) -> int | None:
        """A request to watch, or None where it went out at once. Header and buffer stay as they are until it is complete."""
        flags = SEND_RENDEZVOUS if rendezvous else SEND_EAGER
        parameters = RequestParams(attribute_mask=1 << 4, flags=flags)
        request = self._library.ucp_am_send_nbx(endpoint, message_id, header, len(header), address, length, byref(parameters))
        return self._request("ucp_am_send", request)

    def receive(self, descriptor: int, address: int, length: int) -> int | None:
        """Take a kept rendezvous into a buffer of ours; a request to watch, or None where it is there already."""
        parameters = RequestParams()
        request = self._library.ucp_am_recv_data_nbx(self._worker, descriptor, address, length, byref(parameters))
        return self._request("ucp_am_recv_data", request)

    def drop(self, descriptor: int) -> None:
        """Let a kept rendezvous go."""
        self._library.ucp_am_data_release(self._worker, descriptor)

    def status(self, request: int) -> int:
        """IN_PROGRESS, OK or an error."""
        return int(self._library.ucp_request_check_status(request))

    def forget(self, request: int) -> None:
        self._library.ucp_request_free(request)

    def cancel(self, request: int) -> None:
        self._library.ucp_request_cancel(self._worker, request)

    def _request(self, call: str, request: int | None) -> int | None:
        if request is None or _is_request(request):
            return request
        raise UcpError(call, request - (1 << 64))

    @staticmethod
    def _check(call: str, status: int) -> None:
        if status != OK:
            raise UcpError(call, status)


def _is_request(pointer: int | None) -> bool:
    return pointer is not None and pointer < (1 << 64) + _LAST_ERROR
