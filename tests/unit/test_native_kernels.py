"""Each kernel against its twin in plain torch, in every variant that this CPU can run; and the laws of its bits."""

import math

import numpy as np
import pytest
import torch

from common.engine.native import twins
from common.engine.native.cpu_variant import VARIANTS
from common.engine.native.library import (
    SEQUENCE_DTYPE,
    AttentionStruct,
    NativeEngine,
    NativeLibrary,
    PackedMatrix,
    WeightMemory,
    cache_struct,
)
from common.values.errors import ModelError
from common.values.kv_layout import KvDtype, KvLayout
from tests.native_kernels import library_of

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.name)
def library(request: pytest.FixtureRequest) -> NativeLibrary:
    return library_of(request.param)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(library: NativeLibrary, weights: torch.Tensor) -> PackedMatrix:
    return PackedMatrix(library, weights.view(torch.uint16).numpy() if weights.dtype == torch.bfloat16 else weights.numpy())


def product(engine: NativeEngine, x: torch.Tensor, weights: PackedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = torch.full((len(x), weights.outputs), math.nan)
    engine.gemm(x.numpy(), weights, y.numpy(), None if bias is None else bias.numpy())
    return y


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(1, 2), (16, 64), (50, 66), (100, 576), (40, 1536), (33, 1538), (17, 3300), (20, 6500)]
)
def test_products_are_those_of_the_twin(library: NativeLibrary, dtype: KvDtype, outputs: int, inputs: int) -> None:
    x, weights, bias = random(100, inputs), random(outputs, inputs, seed=1).to(TORCH_DTYPES[dtype]), random(outputs, seed=2)
    rounds = dtype == "bfloat16" and library.variant == "avx512bf16"
    expected = twins.gemm(x.bfloat16() if rounds else x, weights, bias)
    actual = product(NativeEngine(library), x, packed(library, weights), bias)
    torch.testing.assert_close(actual, expected, atol=2e-6 * inputs**0.5 * 8, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_of_a_product_has_the_same_bits_in_any_batch_and_with_any_threads(library: NativeLibrary, dtype: KvDtype) -> None:
    one, three = NativeEngine(library), NativeEngine(library, threads=3)
    for outputs, inputs in ((100, 576), (40, 3300)):
        x, weights = random(130, inputs), packed(library, random(outputs, inputs, seed=1).to(TORCH_DTYPES[dtype]))
        whole = product(one, x, weights)
        assert torch.equal(product(three, x, weights), whole)
        for first, rows in [(0, 1), (129, 1), (64, 2), (7, 3), (1, 9), (3, 16), (50, 33), (20, 97)]:
            part = x[first : first + rows].clone()
            assert torch.equal(product(one, part, weights), whole[first : first + rows]), (first, rows)
            assert torch.equal(product(three, part, weights), whole[first : first + rows]), (first, rows)


def test_rows_may_be_strided(library: NativeLibrary) -> None:
    x, weights = random(9, 40), packed(library, random(20, 32, seed=1))
    y = torch.zeros(9, 30)
    NativeEngine(library).gemm(x.numpy()[:, :32], weights, y.numpy()[:, 5:25])
    assert torch.equal(y[:, 5:25], product(NativeEngine(library), x[:, :32].contiguous(), weights))
    assert not y[:, :5].any()
    assert not y[:, 25:].any()


def test_weights_beside_each_other_give_what_weights_apart_give(library: NativeLibrary) -> None:
    """The last one has no room any more; and the memory stays while one matrix of it does."""
    shapes = [(50, 66), (16, 64), (100, 576), (900, 600)]
    memory = WeightMemory(library, shapes[:-1], 4)
    weights = [random(*shape, seed=place) for place, shape in enumerate(shapes)]
    matrices = [PackedMatrix(library, matrix.numpy(), memory) for matrix in weights]
    del memory
    for matrix in weights:
        x = random(20, matrix.shape[1], seed=9)
        apart = product(NativeEngine(library), x, packed(library, matrix))
        assert torch.equal(product(NativeEngine(library), x, matrices.pop(0)), apart)


def test_odd_rows_of_bf16_are_refused(library: NativeLibrary) -> None:
    with pytest.raises(ModelError, match="packed"):
        packed(library, random(16, 33).bfloat16())


@pytest.mark.parametrize("size", [1, 15, 16, 17, 48, 576, 1000])
def test_norms_are_those_of_the_twin(library: NativeLibrary, size: int) -> None:
    x, weight, y = random(5, size), random(size, seed=1), torch.zeros(5, size)
    library.functions.segue_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), 5, size, 1e-5)
    torch.testing.assert_close(y, twins.norm(x, weight, 1e-5), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("half", [1, 8, 16, 24, 32, 64])
def test_heads_are_turned_as_by_the_twin(library: NativeLibrary, half: int) -> None:
    heads, angles = random(7, 2 * half), random(7, half, seed=1) * 100
    cosine, sine = angles.cos(), angles.sin()
    expected = twins.rotate(heads, cosine, sine)
    library.functions.segue_rotate(heads.data_ptr(), cosine.data_ptr(), sine.data_ptr(), 7, half)
    torch.testing.assert_close(heads, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [1, 16, 31, 96])
def test_the_gate_is_that_of_the_twin(library: NativeLibrary, size: int) -> None:
    x, y = random(4, 2 * size) * 12, torch.zeros(4, size)
    x[0, 0], x[1, 0] = -120.0, 120.0
    library.functions.segue_gate(x.data_ptr(), y.data_ptr(), 4, size)
    torch.testing.assert_close(y, twins.gate(x), atol=1e-6, rtol=1e-5)


def test_the_exponential_is_exact_where_attention_needs_it(library: NativeLibrary) -> None:
    x = torch.cat(
        [torch.linspace(-86.9, 87.9, 16_000), torch.tensor([0.0, -0.0, -105.0, -1e30, -math.inf, math.nan]), torch.zeros(10)]
    )
    y = torch.full_like(x, 7.0)
    library.functions.segue_exponential(x.data_ptr(), y.data_ptr(), len(x))
    torch.testing.assert_close(y[:16_000].double(), x[:16_000].double().exp(), rtol=3e-7, atol=0.0)
    assert y[16_000:16_005].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert y[16_005].isnan()


HEADS, KV_HEADS = 6, 2


def attend(
    engine: NativeEngine,
    cache: torch.Tensor,
    layout: KvLayout,
    query: torch.Tensor,
    rows: list[tuple[int, int, np.ndarray[tuple[int], np.dtype[np.int32]]]],
    sinks: torch.Tensor | None = None,
    *,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """`rows`: (start, count, table) of each sequence; their queries lie behind each other. Layer 1 of the cache is read."""
    out = torch.full_like(query, math.nan)
    sequences = np.zeros(len(rows), dtype=SEQUENCE_DTYPE)
    first = 0
    for place, (start, count, table) in enumerate(rows):
        sequences[place] = (first, start, count, table.ctypes.data)
        first += count
    struct = AttentionStruct(
        queries=query.data_ptr(),
        query_stride=query.stride(0),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        heads=query.shape[1],
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        layer=1,
        scale=layout.head_dim**-0.5,
        softcap=softcap,
        window=window,
        sinks=None if sinks is None else sinks.data_ptr(),
    )
    engine.attention(cache_struct(layout, cache.data_ptr()), struct, sequences)
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block_size", [1, 16, 100])
@pytest.mark.parametrize(
    ("window", "softcap", "with_sinks"), [(0, 0.0, False), (5, 0.0, False), (70, 0.0, False), (0, 2.0, False), (64, 3.0, True)]
)
def test_attention_is_that_of_the_twin_and_one_position_has_one_value(
    library: NativeLibrary, dtype: KvDtype, block_size: int, window: int, softcap: float, with_sinks: bool
) -> None:
    """Rows of other lengths beside each other; whole, in parts and position by position: the same bits, with any threads."""
    layout = KvLayout(layers=2, kv_heads=KV_HEADS, head_dim=32, block_size=block_size, dtype=dtype)
    lengths = (150, 1, 67)
    count = sum(layout.blocks_for(length) for length in lengths)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(3)).to(torch.int32).numpy()
    cache = random(count, 2, 2, KV_HEADS, block_size, 32, seed=4).to(TORCH_DTYPES[dtype])
    sinks = random(HEADS, seed=5) if with_sinks else None
    tables, begin = [], 0
    for length in lengths:
        tables.append(order[begin : begin + layout.blocks_for(length)].copy())
        begin += layout.blocks_for(length)
    queries = [random(length, HEADS, 32, seed=6 + length) for length in lengths]
    rows = [(0, length, table) for length, table in zip(lengths, tables, strict=True)]
    one, two = NativeEngine(library), NativeEngine(library, threads=2)
    for length, table in zip(lengths, tables, strict=True):  # what lies behind the sequence is never read
        if length % block_size:
            cache[int(table[-1]), :, :, :, length % block_size :] = math.nan
    whole = attend(one, cache, layout, torch.cat(queries), rows, sinks, window=window, softcap=softcap)
    expected = [
        twins.attention(
            query, *twins.gather(cache, 1, table.tolist(), length), 0,
            scale=32**-0.5, window=window or None, softcap=softcap or None, sinks=sinks,
        )
        for query, table, length in zip(queries, tables, lengths, strict=True)
    ]  # fmt: skip
    near = 3e-2 if dtype == "bfloat16" and library.variant == "avx512bf16" else 2e-5  # there queries and weights are rounded
    torch.testing.assert_close(whole, torch.cat(expected), atol=near, rtol=near)
    assert torch.equal(attend(two, cache, layout, torch.cat(queries), rows, sinks, window=window, softcap=softcap), whole)
    for at, n in [(0, 1), (63, 1), (64, 1), (65, 1), (149, 1), (0, 33), (33, 1), (34, 100)]:
        part = queries[0][at : at + n].contiguous()
        alone = attend(two, cache, layout, part, [(at, n, tables[0])], sinks, window=window, softcap=softcap)
        assert torch.equal(alone, whole[at : at + n]), (at, n)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 16), (10, 1, 48), (16, 2, 80), (12, 3, 128), (21, 1, 64), (14, 2, 32)]
)
def test_positions_that_come_singly_have_the_bits_of_those_that_come_together(
    library: NativeLibrary, dtype: KvDtype, heads: int, kv_heads: int, head_dim: int
) -> None:
    """For any number of queries a key has, in any batch of sequences, with fewer and more of them than there are threads."""
    layout = KvLayout(layers=2, kv_heads=kv_heads, head_dim=head_dim, block_size=16, dtype=dtype)
    table = torch.randperm(12, generator=torch.Generator().manual_seed(3)).to(torch.int32).numpy()
    cache = random(12, 2, 2, kv_heads, 16, head_dim, seed=4).to(TORCH_DTYPES[dtype])
    query = random(150, heads, head_dim, seed=5)
    whole = attend(NativeEngine(library), cache, layout, query, [(0, 150, table)])
    for threads, positions in [(1, [149]), (2, [149]), (3, [70, 0, 15, 16, 63]), (2, [64, 148, 7, 31, 2, 127, 128])]:
        rows = [(position, 1, table) for position in positions]
        alone = attend(NativeEngine(library, threads), cache, layout, query[positions].contiguous(), rows)
        assert torch.equal(alone, whole[positions]), (threads, positions)
    mixed = [(100, 1, table), (20, 30, table), (149, 1, table)]
    together = attend(NativeEngine(library, 2), cache, layout, query[[100, *range(20, 50), 149]].contiguous(), mixed)
    assert torch.equal(together, whole[[100, *range(20, 50), 149]])
