"""This worker's KV pool in memory that a transport allocated: header, generation words, blocks.

The region's bytes are a contract between processes: a peer on the same host maps them and reads them without asking, so the
header says what they are, and the generation words say whose they are. A block whose generation rose while it was read has
been given to another request.
"""

import ctypes
import mmap
import struct
from typing import Protocol

import numpy as np

from common.adapters.kv_checksum import checksum_of, view_of
from common.values.errors import PeerError
from common.values.kv_layout import HEADER_BYTES, PAGE_BYTES, KvLayout

REGION_MAGIC = b"SEGUE-KV"
REGION_VERSION = 1
INCARNATION_BYTES = 16
_HEADER = struct.Struct("<8sIIIIIQ16s16s")
_TOUCH_BYTES = 64 << 20


class RegionMemory(Protocol):
    """Page-aligned memory for a region; whoever allocated it gives it back, once no view of it is used any more."""

    @property
    def address(self) -> int: ...
    @property
    def size(self) -> int: ...


class AnonymousMemory:
    """Private memory of this process: enough for the tiers that send messages, and for tests."""

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._anchor: ctypes.c_ubyte | None = ctypes.c_ubyte.from_buffer(self._map)
        self.address = ctypes.addressof(self._anchor)
        self.size = size

    def release(self) -> None:
        if self._anchor is not None:
            self._anchor = None
            self._map.close()


def region_size(layout: KvLayout, blocks: int) -> int:
    """Bytes of a region of `blocks` blocks, in whole pages."""
    return -(-layout.region_bytes(blocks) // PAGE_BYTES) * PAGE_BYTES


class MappedKvRegion:
    """A region over an address: our own one, or (never written) a mapped peer's."""

    def __init__(self, address: int, layout: KvLayout, blocks: int) -> None:
        if blocks < 1:
            raise ValueError(f"a region needs at least one block, not {blocks}")
        self._address = address
        self._layout = layout
        self._blocks = blocks
        self._blocks_address = address + layout.blocks_offset(blocks)
        self._generations = view_of(address + HEADER_BYTES, 8 * blocks).cast("Q")

    @property
    def layout(self) -> KvLayout:
        return self._layout

    @property
    def blocks(self) -> int:
        return self._blocks

    @property
    def blocks_address(self) -> int:
        return self._blocks_address

    @property
    def generations(self) -> memoryview:
        return self._generations

    def block_address(self, block: int) -> int:
        """Address of a block's first byte; raises IndexError for a block that the region does not have."""
        if not 0 <= block < self._blocks:
            raise IndexError(f"block {block} of a region of {self._blocks}")
        return self._blocks_address + block * self._layout.block_bytes

    def block_view(self, block: int) -> memoryview:
        return view_of(self.block_address(block), self._layout.block_bytes)

    def seal(self, block: int, *, valid_positions: int) -> bytes:
        layout = self._layout
        if not 0 <= valid_positions <= layout.block_size:
            raise ValueError(f"valid_positions must be between 0 and {layout.block_size}, not {valid_positions}")
        view = self.block_view(block)
        if valid_positions < layout.block_size:
            heads = np.frombuffer(view, dtype=np.uint8).reshape(-1, layout.block_size, layout.head_dim * layout.item_bytes)
            heads[:, valid_positions:] = 0
        return checksum_of(view)

    def header(self) -> bytes:
        return bytes(view_of(self._address, _HEADER.size))


def create_region(memory: RegionMemory, layout: KvLayout, blocks: int, incarnation: bytes) -> MappedKvRegion:
    """Lay a region out in `memory`, writing every page, so that nobody pays page faults later. Blocking."""
    for offset in range(0, memory.size, _TOUCH_BYTES):
        ctypes.memset(memory.address + offset, 0, min(_TOUCH_BYTES, memory.size - offset))
    header = region_header(layout, blocks, incarnation)
    ctypes.memmove(memory.address, header, len(header))
    return MappedKvRegion(memory.address, layout, blocks)


def attach_region(address: int, layout: KvLayout, blocks: int, incarnation: bytes) -> MappedKvRegion:
    """A peer's region that is mapped at `address`; raises PeerError where the bytes there are not the region meant."""
    region = MappedKvRegion(address, layout, blocks)
    if region.header() != region_header(layout, blocks, incarnation):
        raise PeerError("the mapped memory does not begin with the header of the peer's region")
    return region


def touch_for_reading(address: int, size: int) -> None:
    """Read a byte of each page, so that the first copy out of a mapping pays no page faults. Blocking."""
    int(np.frombuffer(view_of(address, size), dtype=np.uint8)[::PAGE_BYTES].sum())


def region_header(layout: KvLayout, blocks: int, incarnation: bytes) -> bytes:
    if len(incarnation) != INCARNATION_BYTES:
        raise ValueError(f"a region's incarnation has {INCARNATION_BYTES} bytes")
    shape = (layout.layers, layout.kv_heads, layout.head_dim, layout.block_size)
    return _HEADER.pack(REGION_MAGIC, REGION_VERSION, *shape, blocks, layout.dtype.encode(), incarnation)
