"""Products with quantised weights against products with their expansion: bit for bit, in every variant that this CPU can run."""

import numpy as np
import pytest
import torch

from common.engine.native.cpu_variant import VARIANTS
from common.engine.native.library import NativeEngine, NativeLibrary, PackedMatrix
from common.engine.quantized_matrix import BlockKind, QuantizedMatrix, can_be_quantized, quantized, stacked
from common.values.errors import ModelError
from tests.native_kernels import library_of

SHAPES = [(1, 32), (16, 64), (37, 96), (192, 576), (100, 1536), (20, 3104)]
ROWS = [*range(1, 18), 33, 64, 97]


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.name)
def library(request: pytest.FixtureRequest) -> NativeLibrary:
    return library_of(request.param)


def random_blocks(kind: BlockKind, rows: int, inputs: int) -> QuantizedMatrix:
    """Any bits as numbers; scales and minima of both signs from the largest float16 down to zeros, by way of subnormal ones."""
    draws = np.random.default_rng(rows * inputs + kind)
    blocks = draws.integers(0, 256, (rows, inputs // 32, kind.block_bytes), dtype=np.uint8)
    halves = 2 if kind == BlockKind.Q4_1 else 1
    magnitude = draws.choice([0.0, 6e-8, 3e-6, 1e-3, 1.0, 60.0, 30_000.0], (rows, inputs // 32, halves))
    scales = (draws.uniform(-2, 2, (rows, inputs // 32, halves)) * magnitude).astype(np.float16)
    blocks[:, :, : 2 * halves] = scales.view(np.uint8).reshape(rows, inputs // 32, 2 * halves)
    return QuantizedMatrix(kind=kind, blocks=blocks.reshape(rows, -1))


def bits(engine: NativeEngine, x: torch.Tensor, weights: PackedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = torch.full((len(x), weights.outputs), 7.0)
    engine.gemm(x.numpy(), weights, y.numpy(), None if bias is None else bias.numpy())
    return y.view(torch.int32)


@pytest.mark.parametrize("kind", BlockKind)
def test_products_have_the_bits_of_the_expansion(library: NativeLibrary, kind: BlockKind) -> None:
    generator = torch.Generator().manual_seed(kind)
    for outputs, inputs in SHAPES:
        weights = random_blocks(kind, outputs, inputs)
        packed, expanded = PackedMatrix(library, weights), PackedMatrix(library, weights.expanded())
        bias = torch.randn(outputs, generator=generator)
        for engine in (NativeEngine(library), NativeEngine(library, threads=3)):
            for rows in ROWS:
                x = torch.randn(rows, inputs, generator=generator)
                assert torch.equal(bits(engine, x, packed, bias), bits(engine, x, expanded, bias)), (outputs, inputs, rows)


@pytest.mark.parametrize("kind", BlockKind)
def test_each_number_is_expanded_as_the_gguf_package_does(library: NativeLibrary, kind: BlockKind) -> None:
    """A product with the unit matrix is the expansion itself. Zeros lose their sign in a sum."""
    weights = random_blocks(kind, 50, 96)
    for rows in (1, 4, 96):
        unit = torch.eye(96)
        parts = [bits(NativeEngine(library), unit[i : i + rows], PackedMatrix(library, weights)) for i in range(0, 96, rows)]
        assert torch.equal(torch.cat(parts).view(torch.float32).T, torch.from_numpy(weights.expanded())), rows


@pytest.mark.parametrize("kind", BlockKind)
def test_rounding_is_to_the_nearest_number_of_a_block(kind: BlockKind) -> None:
    weights = np.random.default_rng(3).standard_normal((64, 256), dtype=np.float32)
    steps = {BlockKind.Q4_0: 8, BlockKind.Q4_1: 15, BlockKind.Q8_0: 127}[kind]
    blocks = weights.reshape(64, -1, 32)
    widest = np.ptp(blocks, axis=2) if kind == BlockKind.Q4_1 else np.abs(blocks).max(axis=2)
    error = np.abs(quantized(weights, kind).expanded() - weights).reshape(64, -1, 32).max(axis=2)
    assert (error <= widest / steps * (1.01 if kind == BlockKind.Q4_0 else 0.57)).all()


def test_rows_of_one_kind_can_be_stacked() -> None:
    parts = [random_blocks(BlockKind.Q4_1, rows, 64) for rows in (3, 20)]
    both = stacked(parts)
    assert both is not None
    assert np.array_equal(both.expanded(), np.concatenate([part.expanded() for part in parts]))
    assert stacked([parts[0], random_blocks(BlockKind.Q8_0, 3, 64)]) is None


def test_what_is_no_rows_of_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="Q4_1"):
        QuantizedMatrix(kind=BlockKind.Q4_1, blocks=np.zeros((3, 41), dtype=np.uint8))
    assert not can_be_quantized((16, 48))
    assert not can_be_quantized((64,))
    assert can_be_quantized((1, 32))
