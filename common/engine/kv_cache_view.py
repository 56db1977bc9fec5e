"""A KV region as a tensor. The transport allocates the memory; here it is only looked at, written and gathered from.

Attention reads by gathering a sequence's blocks into one contiguous scratch tensor, head-first, so that the positions of a
head follow each other; the scratch is reused, because fresh pages cost more than the copy itself.
"""

import ctypes

import torch

from common.values.errors import ModelError
from common.values.kv_layout import KvLayout

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_dtype(layout: KvLayout) -> torch.dtype:
    return _DTYPES[layout.dtype]


class KvCacheView:
    """`data` is `[blocks, layers, 2, kv_heads, block_size, head_dim]` over the memory of the region, which must outlive it."""

    def __init__(self, data: torch.Tensor, layout: KvLayout) -> None:
        self.data = data
        self.layout = layout
        self.blocks = data.shape[0]
        self._positions = data.view(-1, layout.head_dim)
        self._heads = data.view(-1, layout.block_size * layout.head_dim)
        self._scratch = data.new_empty(0)
        heads = torch.arange(layout.kv_heads, device=data.device)
        self._head_rows = heads
        self._pair_rows = torch.arange(2, device=data.device)[:, None] * layout.kv_heads + heads

    @classmethod
    def over_region(cls, *, layout: KvLayout, address: int, blocks: int, device: str) -> "KvCacheView":
        """View `blocks` blocks at `address`, which is memory of this process (device "cpu") or of the CUDA device."""
        shape = (blocks, layout.layers, 2, layout.kv_heads, layout.block_size, layout.head_dim)
        flat = _cpu_tensor(layout, address, blocks) if device == "cpu" else _cuda_tensor(layout, address, blocks, device)
        return cls(flat.view(shape), layout)

    def write_index(self, blocks: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """`[kv_heads * tokens]`: where layer 0 keeps K of each head and token; `blocks` and `offsets` are `[tokens]`."""
        layout = self.layout
        first = blocks * (layout.layers * 2 * layout.kv_heads)
        return ((first[None, :] + self._head_rows[:, None]) * layout.block_size + offsets).reshape(-1)

    def write(self, layer: int, index: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store K and V, each `[kv_heads, tokens, head_dim]`, at `index` (of `write_index`) in `layer`."""
        layout = self.layout
        heads = layout.kv_heads * layout.block_size
        at = index + layer * 2 * heads
        self._positions.index_copy_(0, at, key.reshape(-1, layout.head_dim))
        self._positions.index_copy_(0, at + heads, value.reshape(-1, layout.head_dim))

    def gather_index(self, tables: torch.Tensor) -> torch.Tensor:
        """For block tables `[rows, n]`: where layer 0 keeps the blocks' K and V of each head, `[rows * 2 * kv_heads * n]`."""
        layout = self.layout
        first = tables * (layout.layers * 2 * layout.kv_heads)
        return (first[:, None, None, :] + self._pair_rows[None, :, :, None]).reshape(-1)

    def gather(self, layer: int, index: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, each `[rows, kv_heads, positions, head_dim]`. They hold until the next call."""
        layout = self.layout
        width = layout.block_size * layout.head_dim
        size = index.numel() * width
        if self._scratch.numel() < size:
            self._scratch = self.data.new_empty(size)
        out = self._scratch[:size].view(index.numel(), width)
        torch.index_select(self._heads, 0, index + layer * 2 * layout.kv_heads, out=out)
        pair = out.view(rows, 2, layout.kv_heads, -1, layout.head_dim)
        return pair[:, 0], pair[:, 1]

    def clear(self, blocks: list[int]) -> None:
        """Zero whole blocks: what an earlier owner left must reach neither a sum (0 times NaN is NaN) nor a peer."""
        for block in blocks:
            self.data[block].zero_()


def _cpu_tensor(layout: KvLayout, address: int, blocks: int) -> torch.Tensor:
    memory = (ctypes.c_uint8 * (blocks * layout.block_bytes)).from_address(address)
    return torch.frombuffer(memory, dtype=torch_dtype(layout))


class _DeviceMemory:
    """Memory of a CUDA device under an address, in the form that torch takes without copying."""

    def __init__(self, address: int, count: int, item_type: str) -> None:
        self.__cuda_array_interface__ = {"shape": (count,), "typestr": item_type, "data": (address, False), "version": 3}


def _cuda_tensor(layout: KvLayout, address: int, blocks: int, device: str) -> torch.Tensor:
    if not torch.cuda.is_available():
        raise ModelError(f"device {device!r} was asked for, but torch sees no CUDA device here")
    count = blocks * layout.block_bytes // layout.item_bytes
    item_type = "<f4" if layout.dtype == "float32" else "<i2"
    memory = _DeviceMemory(address, count, item_type)
    return torch.as_tensor(memory, device=device).view(torch_dtype(layout))
