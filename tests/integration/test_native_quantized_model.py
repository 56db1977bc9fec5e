"""Whole models with quantised weights: the bits of their expansion, what rounding costs, and what happens without kernels."""

import os
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from tokenizers import Tokenizer

from common.engine.forward import ModelForward, TransformersForward
from common.engine.kv_cache_view import KvCacheView
from common.engine.load_model import load_model
from common.engine.model_cache import default_cache_dir
from common.engine.model_files import ModelFolder
from common.engine.model_source import ModelSpec, bundled_file, resolve_model
from common.engine.native.choose_forward import choose_forward
from common.engine.native.cpu_variant import VARIANTS
from common.engine.native.llama_model import LlamaModel
from common.engine.native.native_forward import NativeForward
from common.engine.paged_batch import BatchRow
from common.engine.quantization_choice import Quantization, quantized_demand
from common.engine.quantized_file import QUANTIZED_FILE
from common.engine.quantized_weights import stored_weights
from common.engine.safetensors_file import read_tensor_headers
from common.values.errors import ModelError
from common.values.kv_layout import KvLayout
from tests.native_kernels import best_library, library_of
from tests.tiny_models import tiny_llama_gguf

TINY = KvLayout(layers=2, kv_heads=2, head_dim=16, block_size=8)
SMOL = KvLayout(layers=30, kv_heads=3, head_dim=64, block_size=16)
BLOCKS = 40
TEXT = (
    "The Rhine rises in the Swiss Alps, flows north through Lake Constance and then west along the border between Germany and "
    "Switzerland. Below Basel it turns north again. Cities on its banks include Strasbourg, Mainz, Cologne and Rotterdam, where "
    "it reaches the sea. For two thousand years it has been one of the busiest waterways of Europe, carrying salt, wine, coal and "
    "today mostly containers and oil.\n\nQuestion: Why do ships prefer the river to the road? Answer: Because one barge carries as "
    "much as a hundred lorries, and needs a fraction of their fuel."
)


def cache_of(layout: KvLayout) -> KvCacheView:
    shape = (BLOCKS, layout.layers, 2, layout.kv_heads, layout.block_size, layout.head_dim)
    return KvCacheView(torch.zeros(shape), layout)


def all_logits(forward: ModelForward, layout: KvLayout, tokens: list[int]) -> torch.Tensor:
    """A chunk, the rest, then the same once more position by position at the end: prefill and decode kernels both run."""
    cache, blocks = cache_of(layout), tuple(range(BLOCKS))
    cuts = [0, 5, len(tokens) - 4, *range(len(tokens) - 3, len(tokens) + 1)]
    parts = [
        forward.logits(cache, [BatchRow(tokens=tokens[first:last], start=first, blocks=blocks, kept=range(last - first))])
        for first, last in pairwise(cuts)
    ]
    return torch.cat(parts)


def forward_of(
    folder: ModelFolder, layout: KvLayout, quantization: Quantization, *, native: bool = True, check: bool = False
) -> ModelForward:
    library = best_library() if native else None
    forward = choose_forward(
        load_model(folder, dtype="float32"),
        layout,
        device="cpu",
        check=check,
        max_model_len=None,
        library=library,
        quantization=quantization,
        stored=folder.quantized(),
    )
    assert isinstance(forward, NativeForward if native else TransformersForward)
    return forward


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    folder = tmp_path_factory.mktemp("tiny")
    return resolve_model(ModelSpec(model=str(tiny_llama_gguf(folder / "tiny.gguf"))), folder / "cache")


@pytest.fixture(scope="module")
def smol() -> ModelFolder:
    torch.set_num_threads(1)
    return resolve_model(ModelSpec(), default_cache_dir(os.environ))


def test_the_kept_blocks_expand_to_the_folders_weights(tiny: ModelFolder) -> None:
    parameters = dict(load_model(tiny, dtype="float32").named_parameters())
    kept = tiny.quantized()
    assert {matrix.kind.name for matrix in kept.values()} == {"Q8_0", "Q4_0", "Q4_1"}
    for name, matrix in kept.items():
        assert np.array_equal(matrix.read().expanded(), parameters[name].detach().numpy()), name
        assert np.array_equal(matrix.read_row(7).expanded()[0], parameters[name][7].detach().numpy())


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_quantised_model_has_the_bits_of_its_expansion(tiny: ModelFolder, variant: object) -> None:
    library = library_of(variant)  # type: ignore[arg-type]
    tokens = [(7919 * (place + 1)) % 300 for place in range(120)]
    model = load_model(tiny, dtype="float32")
    kept = stored_weights(model, tiny.quantized())
    blocks = NativeForward(library, LlamaModel(library, model, consume=False, quantized=kept))
    expanded = NativeForward(library, LlamaModel(library, model, consume=False))
    assert torch.equal(all_logits(blocks, TINY, tokens), all_logits(expanded, TINY, tokens))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_rounded_weights_mean_the_same_with_and_without_kernels(tiny: ModelFolder, quantization: Quantization) -> None:
    tokens = [(31 * place) % 300 for place in range(60)]
    checked = all_logits(forward_of(tiny, TINY, quantization, check=True), TINY, tokens)
    assert torch.equal(all_logits(forward_of(tiny, TINY, quantization), TINY, tokens), checked)
    by_torch = all_logits(forward_of(tiny, TINY, quantization, native=False, check=True), TINY, tokens)
    assert float((by_torch - checked).abs().max() / checked.std()) < 1e-3
    plain = all_logits(forward_of(tiny, TINY, "none"), TINY, tokens)
    assert not torch.equal(plain, checked)
    assert float((plain - checked).square().mean().sqrt() / plain.std()) < (0.02 if quantization == "int8" else 0.2)


def test_blocks_of_another_model_are_refused(tiny: ModelFolder) -> None:
    model = load_model(tiny, dtype="float32")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.ones_like(model.model.layers[1].mlp.up_proj.weight))  # type: ignore[union-attr,index]
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight differs"):
        stored_weights(model, tiny.quantized())


def test_another_programs_file_of_that_name_is_left_alone(tiny: ModelFolder, tmp_path: Path) -> None:
    for path in tiny.path.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / QUANTIZED_FILE).unlink()
    (tmp_path / QUANTIZED_FILE).symlink_to(tiny.weights[0])
    assert resolve_model(ModelSpec(model=str(tmp_path)), tmp_path / "cache").quantized() == {}


def test_the_plan_counts_the_bytes_that_are_kept(tiny: ModelFolder) -> None:
    config = tiny.config()
    elements = sum(header.elements for header in tiny.tensor_headers())
    kept = tiny.quantized()
    covered = sum(matrix.shape[0] * matrix.shape[1] for matrix in kept.values())
    stored = sum(header.stored_bytes for header in read_tensor_headers(tiny.path / QUANTIZED_FILE))

    def demand(quantization: Quantization, *, native: bool = True) -> tuple[int, bool]:
        plan = quantized_demand(tiny, config, "float32", quantization, device="cpu", native=native)
        return plan.weight_bytes, plan.shared

    assert demand("none") == (4 * elements, False)
    assert demand("auto") == (stored + 4 * (elements - covered), False)
    assert demand("auto", native=False) == (4 * elements, True)
    assert demand("int8", native=False) == (4 * elements, False)
    assert elements < demand("int8")[0] < 1.4 * elements
    assert demand("int4")[0] < demand("int8")[0]


@pytest.mark.model
def test_the_real_models_blocks_expand_to_its_weights_and_bits(smol: ModelFolder) -> None:
    """Every matrix against the gguf package, then logits of prefill and decode, and greedy tokens from there on."""
    origin = {tensor.name: tensor for tensor in gguf.GGUFReader(str(bundled_file())).tensors}
    kept = smol.quantized()
    assert len(kept) == sum(tensor.tensor_type != GGMLQuantizationType.F32 for tensor in origin.values())
    down = kept["model.layers.3.mlp.down_proj.weight"]
    assert np.array_equal(down.read().blocks, origin["blk.3.ffn_down.weight"].data)
    tokens = Tokenizer.from_file(str(smol.path / "tokenizer.json")).encode(TEXT).ids
    blocks, expanded = forward_of(smol, SMOL, "auto"), forward_of(smol, SMOL, "none")
    assert torch.equal(all_logits(blocks, SMOL, tokens), all_logits(expanded, SMOL, tokens))
    for count in (1, 4, 16):
        assert greedy(blocks, tokens, count) == greedy(expanded, tokens, count)


def greedy(forward: ModelForward, tokens: list[int], sequences: int) -> list[list[int]]:
    """Prompts of different lengths beside each other, then eight tokens each."""
    cache = cache_of(SMOL)
    prompts = [tokens[i : i + 2 + i] for i in range(sequences)]
    made: list[list[int]] = [[] for _ in prompts]
    rows = [BatchRow(tokens=p, start=0, blocks=(2 * i, 2 * i + 1), kept=(len(p) - 1,)) for i, p in enumerate(prompts)]
    for step in range(8):
        for tokens_made, row in zip(made, forward.logits(cache, rows), strict=True):
            tokens_made.append(int(row.argmax()))
        rows = [
            BatchRow(tokens=[made[i][-1]], start=len(p) + step, blocks=(2 * i, 2 * i + 1), kept=(0,)) for i, p in enumerate(prompts)
        ]
    return made


def perplexity(forward: ModelForward, tokens: list[int]) -> float:
    logits = all_logits(forward, SMOL, tokens)
    return float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:])).exp())


@pytest.mark.model
def test_rounding_costs_little_perplexity(smol: ModelFolder) -> None:
    tokens = Tokenizer.from_file(str(smol.path / "tokenizer.json")).encode(TEXT).ids
    plain = perplexity(forward_of(smol, SMOL, "none"), tokens)
    assert 3 < plain < 40
    assert perplexity(forward_of(smol, SMOL, "int8"), tokens) == pytest.approx(plain, rel=0.01)
    assert perplexity(forward_of(smol, SMOL, "int4"), tokens) == pytest.approx(plain, rel=0.05)
