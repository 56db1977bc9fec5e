"""The checksum of KV blocks, taken where the bytes lie.

xxh3_128 guards against torn copies, stale blocks and flipped bits; it is not a MAC. Both the hash and the views are free of
copies, and xxhash gives up the GIL while it reads, so a checksum in the copy thread does not hold up the event loop.
"""

import ctypes

import xxhash

CHECKSUM_BYTES = 16


def view_of(address: int, size: int) -> memoryview:
    """The `size` bytes at `address` as a writable view. It does not keep the memory alive: the caller does."""
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


def checksum_of(data: memoryview | bytes) -> bytes:
    """The 16-byte xxh3_128 of `data`, in canonical (big-endian) order."""
    return xxhash.xxh3_128_digest(data)
