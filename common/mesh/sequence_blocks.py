"""Which blocks a sequence holds: found in the prefix cache, taken from the pool, given back, named for others to find."""

from collections.abc import Iterable

from common.mesh.sequence import Sequence
from common.policy.block_hash import extend_hashes
from common.policy.block_pool import BlockPool
from common.policy.preemption import Candidate, choose_victim
from common.values.kv_layout import KvLayout


class SequenceBlocks:
    """One per engine."""

    def __init__(self, pool: BlockPool, layout: KvLayout, max_model_len: int) -> None:
        self.pool = pool
        self.layout = layout
        self._max_model_len = max_model_len
        self.prefix_hit_tokens = 0

    def known_prefix(self, sequence: Sequence, positions: int) -> list[int]:
        """Blocks known here that hold the first `positions` positions of the sequence or fewer, full blocks only."""
        full = positions // self.layout.block_size
        extend_hashes(sequence.hashes, sequence.root, sequence.tokens, self.layout.block_size, full)
        return self.pool.match(sequence.hashes[:full])

    def known_tokens(self, sequence: Sequence) -> int:
        """Positions that need not be computed, were it started now."""
        return len(self._known(sequence)) * self.layout.block_size

    def _known(self, sequence: Sequence) -> list[int]:
        """The last token is always computed again, since its logits are needed; prompt log-probabilities need every position."""
        return [] if sequence.wants_prompt_logprobs else self.known_prefix(sequence, len(sequence.tokens) - 1)

    def _to_start(self, sequence: Sequence) -> int:
        return self.layout.blocks_for(min(len(sequence.tokens) + 1, self._max_model_len))

    def has_room_for(self, sequence: Sequence) -> bool:
        known = self._known(sequence)
        return self.pool.evictable_outside(known) >= self._to_start(sequence) - len(known)

    def start(self, sequence: Sequence) -> bool:
        """Blocks for all of the sequence's tokens and the next one, or nothing."""
        known = self._known(sequence)
        if not self._take(sequence, known, self._to_start(sequence) - len(known)):
            return False
        sequence.computed = sequence.planned = len(known) * self.layout.block_size
        self.prefix_hit_tokens += sequence.computed
        return True

    def reserve(self, sequence: Sequence, positions: int) -> bool:
        """Blocks for imported positions and one to decode into; what is known already is shared."""
        known = self.known_prefix(sequence, positions)
        return self._take(sequence, known, min(self.layout.blocks_for(positions) + 1, self.pool.total) - len(known))

    def _take(self, sequence: Sequence, known: list[int], needed: int) -> bool:
        if self.pool.evictable_outside(known) < needed:
            return False
        self.pool.share(known)
        sequence.blocks = known + self.pool.allocate(needed)
        sequence.named = len(known)
        return True

    def missing(self, sequence: Sequence, positions: int) -> int:
        """Blocks that its table lacks to reach `positions`."""
        return self.layout.blocks_for(positions) - len(sequence.blocks)

    def extend(self, sequence: Sequence, count: int) -> None:
        sequence.blocks += self.pool.allocate(count)

    def free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []

    def name_full(self, sequence: Sequence) -> None:
        """Full blocks that were computed can be found by others from now on."""
        full = sequence.computed // self.layout.block_size
        extend_hashes(sequence.hashes, sequence.root, sequence.tokens, self.layout.block_size, full)
        for index in range(sequence.named, full):
            self.pool.name(sequence.blocks[index], sequence.hashes[index])
        sequence.named = max(sequence.named, full)


def victim_among(running: Iterable[Sequence]) -> Sequence | None:
    """Who gives up its blocks where the pool is full."""
    candidates = {s.handle: s for s in running}
    handle = choose_victim([Candidate(handle=s.handle, arrived=s.arrived, protected=s.is_protected) for s in candidates.values()])
    return None if handle is None else candidates[handle]
