"""The prefix cache of one simulated worker: the mesh's own block pool, with whole prompts named and left as cache."""

from collections.abc import Sequence

from common.policy.block_pool import BlockPool

NAME_BYTES = 8


class SimulatedPrefixCache:
    """`blocks` of `block_tokens` each. Blocks of a prompt that is being computed are not held: in a pool that is much larger
    than what runs at a time they would not be evicted anyway."""

    def __init__(self, blocks: int, block_tokens: int) -> None:
        self._pool = BlockPool(blocks, [0] * blocks)
        self._blocks = blocks
        self._block_tokens = block_tokens

    def cached_tokens(self, prefix: Sequence[int], prompt_tokens: int) -> int:
        """The last token is always computed."""
        matched = len(self._pool.match(_names(prefix)))
        return min(matched * self._block_tokens, prompt_tokens - 1)

    def computed(self, prefix: Sequence[int], prompt_tokens: int) -> None:
        """The full blocks of the prompt are cached now, the most recently used of all."""
        names = _names(prefix[: min(prompt_tokens // self._block_tokens, self._blocks)])
        held = self._pool.match(names)
        self._pool.share(held)
        fresh = self._pool.allocate(len(names) - len(held))
        for block, name in zip(fresh, names[len(held) :], strict=True):
            self._pool.name(block, name)
        self._pool.release([*held, *fresh])


def _names(prefix: Sequence[int]) -> list[bytes]:
    return [name.to_bytes(NAME_BYTES, "little") for name in prefix]
