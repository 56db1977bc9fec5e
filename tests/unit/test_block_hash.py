"""Names of blocks: equal for equal prefixes under equal weights and tenant, different for everything else."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from common.policy.block_hash import HASH_BYTES, extend_hashes, root_hash
from common.values.kv_layout import Fingerprint, KvLayout

LAYOUT = KvLayout(layers=2, kv_heads=1, head_dim=8, block_size=4)
FINGERPRINT = Fingerprint(weights="w", dtype="float32", layout=LAYOUT)
ROOT = root_hash(FINGERPRINT, b"")
TOKENS = st.lists(st.integers(0, 3), max_size=20)


def names(tokens: list[int], root: bytes = ROOT) -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, root, tokens, 4)
    return hashes


@given(TOKENS, TOKENS)
def test_names_are_equal_exactly_as_far_as_the_tokens_are(one: list[int], other: list[int]) -> None:
    shared = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    for index, (a, b) in enumerate(zip(names(one), names(other), strict=False)):
        assert (a == b) == ((index + 1) * 4 <= shared)


@given(TOKENS, st.lists(st.integers(0, 6), max_size=4))
def test_a_chain_grows_to_the_same_names_however_it_is_extended(tokens: list[int], bounds: list[int]) -> None:
    hashes: list[bytes] = []
    for bound in bounds:
        extend_hashes(hashes, ROOT, tokens, 4, bound)
        assert len(hashes) <= len(tokens) // 4
    extend_hashes(hashes, ROOT, tokens, 4)
    assert hashes == names(tokens)
    assert all(len(name) == HASH_BYTES for name in hashes)


def test_weights_dtype_layout_and_tenant_separate_kernels_do_not() -> None:
    others = [
        replace(FINGERPRINT, weights="v"),
        replace(FINGERPRINT, dtype="bfloat16"),
        replace(FINGERPRINT, layout=replace(LAYOUT, head_dim=16)),
    ]
    roots = [ROOT, *(root_hash(other, b"") for other in others), root_hash(FINGERPRINT, b"a"), root_hash(FINGERPRINT, b"a" * 200)]
    assert len({name for root in roots for name in names([1, 2, 3, 4], root)}) == len(roots)
    assert root_hash(replace(FINGERPRINT, kernels="other"), b"") == ROOT
