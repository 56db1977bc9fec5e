"""The shape of a KV region and what two workers must share before blocks may move between them."""

from dataclasses import dataclass
from typing import Literal

KvDtype = Literal["float32", "bfloat16", "float16"]
_ITEM_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
HEADER_BYTES = 4096
PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """`[blocks, layers, 2, kv_heads, block_size, head_dim]`: a block is one contiguous run of bytes,
    the unit of transfer, generation and checksum on every tier."""

    layers: int
    kv_heads: int
    head_dim: int
    block_size: int = 16
    dtype: KvDtype = "float32"

    @property
    def item_bytes(self) -> int:
        return _ITEM_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.layers * 2 * self.kv_heads * self.block_size * self.head_dim * self.item_bytes

    def blocks_offset(self, blocks: int) -> int:
        """Byte offset of block 0 in a region of `blocks` blocks: header, then `generation u64[blocks]`, page-aligned."""
        return -(-(HEADER_BYTES + 8 * blocks) // PAGE_BYTES) * PAGE_BYTES

    def region_bytes(self, blocks: int) -> int:
        return self.blocks_offset(blocks) + blocks * self.block_bytes

    def blocks_for(self, positions: int) -> int:
        """Blocks that hold `positions` positions."""
        return -(-positions // self.block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """Equal fingerprints mean that a block computed by one worker may be decoded by another.

    `weights` is a digest of weights and configuration; `kernels` names the kernel variant (carried and counted; refused only
    with --strict-kernels).
    """

    weights: str
    dtype: str
    layout: KvLayout
    kernels: str = "torch"

    def differs_from(self, other: "Fingerprint", *, strict_kernels: bool = False) -> str | None:
        """The name of the first field that forbids a hand-off, or None where the two can pair."""
        names = ("weights", "dtype", "layout", "kernels") if strict_kernels else ("weights", "dtype", "layout")
        return next((name for name in names if getattr(self, name) != getattr(other, name)), None)
