"""The structs and callback types of libucp's API 1.11, field by field: `ucp_library` alone uses them.

Later releases only append fields, which their field masks say are not set. Names follow UCX's, in whole words.
"""

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_int8, c_size_t, c_uint, c_uint32, c_uint64, c_void_p


class ContextParams(ctypes.Structure):
    _fields_ = [
        ("field_mask", c_uint64),
        ("features", c_uint64),
        ("request_size", c_size_t),
        ("request_init", c_void_p),
        ("request_cleanup", c_void_p),
        ("tag_sender_mask", c_uint64),
        ("mt_workers_shared", c_int),
        ("estimated_num_eps", c_size_t),
        ("estimated_num_ppn", c_size_t),
        ("name", c_char_p),
    ]


class WorkerParams(ctypes.Structure):
    _fields_ = [
        ("field_mask", c_uint64),
        ("thread_mode", c_int),
        ("cpu_mask", c_uint64 * 16),
        ("events", c_uint),
        ("user_data", c_void_p),
        ("event_fd", c_int),
        ("flags", c_uint64),
        ("name", c_char_p),
        ("am_alignment", c_size_t),
        ("client_id", c_uint64),
    ]


class ErrorHandler(ctypes.Structure):
    _fields_ = [("callback", c_void_p), ("argument", c_void_p)]


class SocketAddress(ctypes.Structure):
    _fields_ = [("address", c_void_p), ("length", c_uint)]


class EndpointParams(ctypes.Structure):
    _fields_ = [
        ("field_mask", c_uint64),
        ("address", c_void_p),
        ("error_mode", c_int),
        ("error_handler", ErrorHandler),
        ("user_data", c_void_p),
        ("flags", c_uint),
        ("socket_address", SocketAddress),
        ("connection_request", c_void_p),
        ("name", c_char_p),
        ("local_socket_address", SocketAddress),
    ]


class MemoryMapParams(ctypes.Structure):
    _fields_ = [
        ("field_mask", c_uint64),
        ("address", c_void_p),
        ("length", c_size_t),
        ("flags", c_uint),
        ("protection", c_uint),
        ("memory_type", c_int),
        ("exported_handle", c_void_p),
    ]


class MemoryAttributes(ctypes.Structure):
    _fields_ = [("field_mask", c_uint64), ("address", c_void_p), ("length", c_size_t), ("memory_type", c_int)]


class RequestParams(ctypes.Structure):
    _fields_ = [
        ("attribute_mask", c_uint32),
        ("flags", c_uint32),
        ("request", c_void_p),
        ("callback", c_void_p),
        ("datatype", c_uint64),
        ("user_data", c_void_p),
        ("reply_buffer", c_void_p),
        ("memory_type", c_int),
        ("receive_info", c_void_p),
        ("memory_handle", c_void_p),
    ]


class MessageHandlerParams(ctypes.Structure):
    _fields_ = [
        ("field_mask", c_uint64),
        ("id", c_uint),
        ("flags", c_uint32),
        ("callback", c_void_p),
        ("argument", c_void_p),
    ]


class MessageReceiveParams(ctypes.Structure):
    _fields_ = [("attributes", c_uint64), ("reply_endpoint", c_void_p)]


ERROR_CALLBACK = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int8)
MESSAGE_CALLBACK = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, POINTER(MessageReceiveParams))
