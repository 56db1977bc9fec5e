"""Moving KV blocks: what is asked for, and what came of it."""

from dataclasses import dataclass
from typing import Literal

Tier = Literal["shm", "ucx", "tcp", "memory"]
PullOutcome = Literal["copied", "generation", "checksum", "refused", "lost"]
"""`generation`: the block was given to another request; `checksum`: bytes differ; `refused`: the peer does not grant this
reservation; `lost`: the peer went away. Only `copied` blocks may be decoded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSource:
    """One block to pull: where it lies at the peer, its fence, and the landing block of our own region."""

    source_block: int
    generation: int
    checksum: bytes
    landing_block: int
