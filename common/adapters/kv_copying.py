"""The copies themselves: out of a mapped peer region, into a message, out of a message. All of it blocking, none of it async.

Every copy keeps two rules: a block's generation is compared before and after its bytes are read, and a checksum is taken of
our own bytes, after they have landed. Blocks that follow each other on both sides are copied in one run, bounded so that the
bytes are still in the core's cache for the checksum and the GIL is given up often.

The generation words are read between calls that release and take the GIL, which orders them well enough around the copy; what
a weaker memory model would still let through, the checksum catches.
"""

import ctypes
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from common.adapters.kv_checksum import checksum_of
from common.adapters.kv_region import MappedKvRegion
from common.ports.kv_transport import BlockSource, PullOutcome, Tier

RUN_BYTES = 1 << 20

STATUS_COPIED = 0
STATUS_GENERATION = 1
STATUS_REFUSED = 2
STATUS_OVERTAKEN = 3
"""`STATUS_OVERTAKEN`: the block was packed, but its generation rose meanwhile: its place in the message is blank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferRecord:
    """What one pull took, in seconds: the copy into landing blocks and the checksum are the copy thread's time."""

    tier: Tier
    blocks: int
    bytes_moved: int
    total_s: float
    copy_s: float
    checksum_s: float
    outcomes: Mapping[PullOutcome, int]


TransferObserver = Callable[[TransferRecord], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Landed:
    """The outcomes of a batch, in order, and where its time went."""

    outcomes: list[PullOutcome]
    copy_s: float = 0.0
    checksum_s: float = 0.0


def copy_mapped(peer: MappedKvRegion, own: MappedKvRegion, sources: Sequence[BlockSource]) -> Landed:
    """Copy blocks out of a mapped region into our own (a seqlock's reader)."""
    outcomes: list[PullOutcome] = []
    copy_s = checksum_s = 0.0
    block_bytes = own.layout.block_bytes
    generations = peer.generations
    for run in _runs(sources, max(1, RUN_BYTES // block_bytes)):
        if run[0].source_block >= peer.blocks or run[-1].source_block >= peer.blocks:
            outcomes.extend(["refused"] * len(run))
            continue
        fresh = [generations[source.source_block] == source.generation for source in run]
        started = time.perf_counter()
        if any(fresh):
            landing = own.block_address(run[0].landing_block)
            ctypes.memmove(landing, peer.block_address(run[0].source_block), len(run) * block_bytes)
        copied = time.perf_counter()
        for source, was_fresh in zip(run, fresh, strict=True):
            still_fresh = was_fresh and generations[source.source_block] == source.generation
            outcomes.append(_verify(own, source) if still_fresh else "generation")
        copy_s += copied - started
        checksum_s += time.perf_counter() - copied
    return Landed(outcomes=outcomes, copy_s=copy_s, checksum_s=checksum_s)


def pack_blocks(
    region: MappedKvRegion, granted: Mapping[int, int], blocks: Sequence[int], generations: Sequence[int], target_address: int
) -> bytes:
    """Copy the asked-for blocks that are granted and current, one after the other, to `target_address`; one status a block.

    Blocks with STATUS_COPIED or STATUS_OVERTAKEN take a place in the message, the others none.
    """
    block_bytes = region.layout.block_bytes
    statuses = bytearray()
    places: list[tuple[int, int]] = []
    for index, (block, generation) in enumerate(zip(blocks, generations, strict=True)):
        statuses.append(_servable(region, granted, block, generation))
        if statuses[index] == STATUS_COPIED:
            place = target_address + len(places) * block_bytes
            ctypes.memmove(place, region.block_address(block), block_bytes)
            places.append((index, place))
    for index, place in places:
        if region.generations[blocks[index]] != generations[index]:
            statuses[index] = STATUS_OVERTAKEN
            ctypes.memset(place, 0, block_bytes)
    return bytes(statuses)


def packed_blocks(statuses: bytes) -> int:
    """How many blocks a message with these statuses carries."""
    return statuses.count(STATUS_COPIED) + statuses.count(STATUS_OVERTAKEN)


def land_packed(own: MappedKvRegion, sources: Sequence[BlockSource], statuses: bytes, packed_address: int) -> Landed:
    """Copy the blocks of a received message into their landing blocks and check them there."""
    outcomes: list[PullOutcome] = []
    copy_s = checksum_s = 0.0
    block_bytes = own.layout.block_bytes
    place = packed_address
    for source, status in zip(sources, statuses, strict=True):
        match status:
            case 0:
                started = time.perf_counter()
                ctypes.memmove(own.block_address(source.landing_block), place, block_bytes)
                copied = time.perf_counter()
                outcomes.append(_verify(own, source))
                place += block_bytes
                copy_s += copied - started
                checksum_s += time.perf_counter() - copied
            case 3:
                outcomes.append("generation")
                place += block_bytes
            case 1:
                outcomes.append("generation")
            case _:
                outcomes.append("refused")
    return Landed(outcomes=outcomes, copy_s=copy_s, checksum_s=checksum_s)


def check_landing(own: MappedKvRegion, sources: Sequence[BlockSource]) -> None:
    """Raise IndexError before anything moves where a landing block is not ours: that is the caller's bug."""
    for source in sources:
        own.block_address(source.landing_block)
        if source.source_block < 0:
            raise IndexError(f"source block {source.source_block}")


def _servable(region: MappedKvRegion, granted: Mapping[int, int], block: int, generation: int) -> int:
    allowed = granted.get(block)
    if allowed is None or not 0 <= block < region.blocks:
        return STATUS_REFUSED
    if allowed != generation or region.generations[block] != generation:
        return STATUS_GENERATION
    return STATUS_COPIED


def _verify(own: MappedKvRegion, source: BlockSource) -> PullOutcome:
    return "copied" if checksum_of(own.block_view(source.landing_block)) == source.checksum else "checksum"


def _runs(sources: Sequence[BlockSource], longest: int) -> Iterator[Sequence[BlockSource]]:
    """Cut `sources` into runs whose source and landing blocks both follow each other."""
    first = 0
    for index in range(1, len(sources) + 1):
        if index == len(sources) or index - first == longest or not _follows(sources[index - 1], sources[index]):
            yield sources[first:index]
            first = index


def _follows(earlier: BlockSource, later: BlockSource) -> bool:
    return later.source_block == earlier.source_block + 1 and later.landing_block == earlier.landing_block + 1
