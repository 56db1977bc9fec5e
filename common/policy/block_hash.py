"""Names for the content of full KV blocks: a hash chain over fingerprint, tenant salt and token ids.

Equal names mean equal tokens from position 0 on, under the same weights and for the same tenant, so that a block may be
shared. blake2b rather than a fast hash: a name that an attacker could forge would answer with another prompt's KV.
(The chain is vLLM's automatic prefix caching; the root binds tenant and weights.)
"""

import array
import hashlib
from collections.abc import Sequence

from common.values.kv_layout import Fingerprint

BlockHash = bytes
HASH_BYTES = 16


def root_hash(fingerprint: Fingerprint, salt: bytes) -> BlockHash:
    """Where every chain of one (weights, dtype, layout, tenant) begins."""
    material = f"{fingerprint.weights}|{fingerprint.dtype}|{fingerprint.layout}".encode()
    return hashlib.blake2b(material, digest_size=HASH_BYTES, key=hashlib.blake2b(salt, digest_size=32).digest()).digest()


def extend_hashes(hashes: list[BlockHash], root: BlockHash, tokens: Sequence[int], block_size: int, blocks: int | None = None) -> None:
    """Append the names of the full blocks of `tokens` that `hashes` does not have yet (up to `blocks` of them)."""
    full = len(tokens) // block_size if blocks is None else min(blocks, len(tokens) // block_size)
    while len(hashes) < full:
        start = len(hashes) * block_size
        parent = hashes[-1] if hashes else root
        content = array.array("q", tokens[start : start + block_size]).tobytes()
        hashes.append(hashlib.blake2b(parent + content, digest_size=HASH_BYTES).digest())
