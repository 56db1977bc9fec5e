"""The rows of one forward, flattened: no padding between sequences, one line of tokens for the model's own linears.

Rows of a single position (decode) come first and are grouped by the length of their cache, rounded up to LENGTH_STEP blocks, so
that one gather and one attention call serve a group. A row's padded length depends on itself alone: its bits do not
change with its neighbours. Chunks of prompts follow, one attention call each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import torch

from common.engine.block_table import BlockTable
from common.engine.kv_cache_view import KvCacheView

LENGTH_STEP = 4
"""Blocks. Decode rows are padded to a multiple of this."""
GATHER_BYTES = 64 * 2**20
"""A group of decode rows is split so that what it gathers per layer stays below this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRow:
    """Positions `start .. start + len(tokens) - 1` of one sequence. `kept` names those (by place in `tokens`) whose logits
    are wanted. `table` is `blocks` as the kernels read them, where the caller keeps it."""

    tokens: Sequence[int]
    start: int
    blocks: tuple[int, ...]
    kept: Sequence[int] = ()
    table: BlockTable | None = None

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class AttentionKernel(Protocol):
    """Attends over the cache for all rows of a batch, in place of the gathering below."""

    def attend(
        self, layer: int, query: torch.Tensor, scale: float, window: int | None, softcap: float | None, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """`query` is `[heads, tokens, head_dim]`; returns `[tokens, heads, head_dim]`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """Rows of one position each that lie at `first .. first + rows - 1` of the batch. `length` is the padded one."""

    first: int
    rows: int
    length: int
    positions: torch.Tensor
    gather: torch.Tensor
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Positions `start .. start + count - 1` of one sequence, at `first` of the batch. `gather` is None where start is 0."""

    first: int
    start: int
    count: int
    gather: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedBatch:
    """What the model and its attention need for one forward. `kept` indexes the flattened tokens, in the order of the rows
    as they were given. With a `kernel` the rows lie as they were given, and there are no groups and chunks. `called` collects
    the layers whose attention ran."""

    cache: KvCacheView
    tokens: torch.Tensor
    positions: torch.Tensor
    write: torch.Tensor
    kept: torch.Tensor
    groups: tuple[DecodeGroup, ...]
    chunks: tuple[Chunk, ...]
    fresh_blocks: tuple[int, ...]
    kernel: AttentionKernel | None = None
    called: list[int] = field(default_factory=list)


def paged_batch(cache: KvCacheView, rows: Sequence[BatchRow], kernel: AttentionKernel | None = None) -> PagedBatch:
    device, size = cache.data.device, cache.layout.block_size
    order = sorted(range(len(rows)), key=lambda i: _place(rows[i], size)) if kernel is None else list(range(len(rows)))
    tokens: list[int] = []
    positions: list[int] = []
    blocks: list[int] = []
    first: dict[int, int] = {}
    for i in order:
        row = rows[i]
        first[i] = len(tokens)
        tokens.extend(row.tokens)
        positions.extend(range(row.start, row.end))
        blocks.extend(row.blocks[position // size] for position in range(row.start, row.end))
    at = torch.tensor(positions, device=device)
    return PagedBatch(
        cache=cache,
        tokens=torch.tensor(tokens, device=device),
        positions=at,
        write=cache.write_index(torch.tensor(blocks, device=device), at % size),
        kept=torch.tensor([first[i] + place for i, row in enumerate(rows) for place in row.kept], dtype=torch.long, device=device),
        groups=() if kernel else tuple(_groups(cache, [rows[i] for i in order if len(rows[i].tokens) == 1])),
        chunks=() if kernel else tuple(_chunk(cache, rows[i], first[i]) for i in order if len(rows[i].tokens) > 1),
        fresh_blocks=tuple(block for row in rows for block in fresh_blocks(row, size)),
        kernel=kernel,
    )


def _place(row: BatchRow, block_size: int) -> tuple[bool, int]:
    """Decode rows before chunks, and those of equal padded length side by side."""
    chunk = len(row.tokens) > 1
    return chunk, 0 if chunk else _padded_blocks(row, block_size)


def _padded_blocks(row: BatchRow, block_size: int) -> int:
    return -(-row.end // (block_size * LENGTH_STEP)) * LENGTH_STEP


def _groups(cache: KvCacheView, rows: Sequence[BatchRow]) -> list[DecodeGroup]:
    layout = cache.layout
    groups: list[DecodeGroup] = []
    first = 0
    for blocks, same in groupby(rows, key=lambda row: _padded_blocks(row, layout.block_size)):
        members = list(same)
        limit = max(1, GATHER_BYTES * layout.layers // (blocks * layout.block_bytes))
        for begin in range(0, len(members), limit):
            part = members[begin : begin + limit]
            groups.append(_group(cache, part, first, blocks))
            first += len(part)
    return groups


def _group(cache: KvCacheView, rows: Sequence[BatchRow], first: int, blocks: int) -> DecodeGroup:
    size, device = cache.layout.block_size, cache.data.device
    tables = [_padded_table(row, blocks, size) for row in rows]
    return DecodeGroup(
        first=first,
        rows=len(rows),
        length=blocks * size,
        positions=torch.tensor([row.start for row in rows], device=device),
        gather=cache.gather_index(torch.tensor(tables, device=device)),
    )


def _padded_table(row: BatchRow, blocks: int, block_size: int) -> list[int]:
    """Padding repeats the row's own first block: masked, and finite unless the row itself is broken."""
    used = -(-row.end // block_size)
    return [*row.blocks[:used], *[row.blocks[0]] * (blocks - used)]


def _chunk(cache: KvCacheView, row: BatchRow, first: int) -> Chunk:
    gather = None
    if row.start > 0:
        table = row.blocks[: cache.layout.blocks_for(row.end)]
        gather = cache.gather_index(torch.tensor([table], device=cache.data.device))
    return Chunk(first=first, start=row.start, count=len(row.tokens), gather=gather)


def fresh_blocks(row: BatchRow, block_size: int) -> tuple[int, ...]:
    """The last block of the row where this forward writes its beginning but not its end: its tail must be zeroed first."""
    last = (row.end - 1) // block_size
    begins_here = row.start <= last * block_size
    return (row.blocks[last],) if begins_here and row.end % block_size else ()
