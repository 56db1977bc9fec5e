"""The Llama family on native kernels: the tokens and logits of transformers, and the same bits however positions came."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers

from common.engine.forward import TransformersForward
from common.engine.kv_cache_view import KvCacheView, torch_dtype
from common.engine.native.choose_forward import choose_forward
from common.engine.native.cpu_variant import VARIANTS
from common.engine.native.library import NativeLibrary
from common.engine.native.llama_model import LlamaModel, misfit
from common.engine.native.native_forward import NativeForward
from common.engine.paged_batch import BatchRow
from common.engine.torch_step import TorchExecutor
from common.values.errors import ModelError
from common.values.kv_layout import KvDtype, KvLayout
from tests.native_kernels import best_library, library_of
from tests.step_engines import LAYOUT as LLAMA_LAYOUT
from tests.step_engines import Memory, chunk, generate, prompt_of, random_model, run, started, tiny_llama, token_of, torch_executor

VOCABULARY = 203
BLOCKS = 60
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILY: dict[str, dict[str, object]] = {
    "LlamaConfig": {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "MistralConfig": {"sliding_window": 8},
    "Qwen2Config": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2},
    "Qwen3Config": {"head_dim": 32, "attention_bias": True},
    "SmolLM3Config": {"no_rope_layers": [1, 0, 1, 1], "mlp_bias": True},
}


def build(name: str, dtype: KvDtype = "float32") -> torch.nn.Module:
    options = {
        "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 4, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, **FAMILY[name],
    }  # fmt: skip
    model = random_model(getattr(transformers, name)(**options))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases that do something
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.to({"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype])


def layout_of(model: torch.nn.Module, dtype: KvDtype, block_size: int = 4) -> KvLayout:
    return KvLayout(layers=4, kv_heads=2, head_dim=model.config.head_dim, block_size=block_size, dtype=dtype)  # type: ignore[union-attr,arg-type]


def empty_cache(layout: KvLayout) -> KvCacheView:
    shape = (BLOCKS, layout.layers, 2, layout.kv_heads, layout.block_size, layout.head_dim)
    return KvCacheView(torch.full(shape, float("nan"), dtype=torch_dtype(layout)), layout)


def native(model: torch.nn.Module, library: NativeLibrary | None = None) -> NativeForward:
    assert misfit(model) is None
    lib = library or best_library()
    return NativeForward(lib, LlamaModel(lib, model, consume=False))


def rows_of(prompts: Sequence[list[int]], begin: Sequence[int], end: Sequence[int]) -> list[BatchRow]:
    """Prompt i keeps its positions in the blocks i, i + n, i + 2n, ...; logits of all positions are kept."""
    return [
        BatchRow(tokens=prompt[first:last], start=first, blocks=tuple(range(i, BLOCKS, len(prompts))), kept=range(last - first))
        for i, (prompt, first, last) in enumerate(zip(prompts, begin, end, strict=True))
        if last > first
    ]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("name", FAMILY)
def test_logits_are_those_of_transformers_own_attention(variant: object, name: str) -> None:
    model = build(name)
    forward = native(model, library_of(variant))  # type: ignore[arg-type]
    prompt = [(7919 * (place + 1)) % VOCABULARY for place in range(150)]
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.inference_mode():
        expected = model(torch.tensor([prompt]), use_cache=False).logits[0]
    actual = forward.logits(empty_cache(layout_of(model, "float32")), rows_of([prompt], [0], [150]))
    assert float((actual - expected).abs().max() / expected.std()) < 2e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILY)
def test_a_position_has_the_same_bits_alone_batched_chunked_decoded_and_with_more_threads(name: str, dtype: KvDtype) -> None:
    model = build(name, dtype)
    layout = layout_of(model, dtype)
    forward, threaded = native(model), native(model)
    threaded.prepare_thread(2)
    prompts = [[(7919 * (place + 1) + 31 * i) % VOCABULARY for place in range(length)] for i, length in enumerate((75, 3, 40))]
    alone = [forward.logits(empty_cache(layout), rows_of([prompt], [0], [len(prompt)])) for prompt in prompts]
    for by in (forward, threaded):
        together = by.logits(empty_cache(layout), rows_of(prompts, [0] * 3, [len(prompt) for prompt in prompts]))
        assert torch.equal(together, torch.cat(alone))
    for cuts in ([0, 20, 21, 22, 64, 75], list(range(76))):
        cache = empty_cache(layout)
        parts = [forward.logits(cache, rows_of(prompts[:1], [first], [last])) for first, last in pairwise(cuts)]
        assert torch.equal(torch.cat(parts), alone[0]), cuts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_decoded_beside_31_others_has_the_bits_it_has_alone(dtype: KvDtype) -> None:
    model = build("LlamaConfig", dtype)
    layout = layout_of(model, dtype, block_size=48)
    forward = native(model)
    prompts = [[(17 * place + i) % VOCABULARY for place in range(2 + i)] for i in range(32)]
    rows = [BatchRow(tokens=prompt, start=0, blocks=(i,), kept=()) for i, prompt in enumerate(prompts)]
    cache = empty_cache(layout)
    forward.logits(cache, rows)
    decode = [BatchRow(tokens=[5 + i], start=2 + i, blocks=(i,), kept=(0,)) for i in range(32)]
    together = forward.logits(cache, decode)
    for count in (1, 4, 9, 16):
        for first in range(0, 32 - count, count):
            assert torch.equal(forward.logits(cache, decode[first : first + count]), together[first : first + count])


def test_bf16_stays_near_float32() -> None:
    """Weights rounded once; the float32 model has the rounded weights too. The differences are of rounding, not of kind."""
    narrow = build("Qwen2Config", "bfloat16")
    wide = build("Qwen2Config", "bfloat16").float()
    rows = rows_of([[(7919 * (place + 1)) % VOCABULARY for place in range(60)]], [0], [60])
    expected = native(wide).logits(empty_cache(layout_of(wide, "float32")), rows)
    actual = native(narrow).logits(empty_cache(layout_of(narrow, "bfloat16")), rows)
    assert float((actual - expected).square().mean().sqrt() / expected.std()) < 0.1


def test_blocks_that_are_not_the_rows_own_are_not_touched_and_begun_ones_are_zeroed() -> None:
    model = build("LlamaConfig")
    cache = empty_cache(layout_of(model, "float32"))
    native(model).logits(cache, [BatchRow(tokens=[3] * 6, start=0, blocks=(7, 9), kept=(5,))])
    begun = [block for block in range(BLOCKS) if cache.data[block].isfinite().all()]
    assert begun == [7, 9]
    assert not cache.data[9, :, :, :, 2:].any()


@pytest.mark.parametrize("sampled", [False, True])
def test_the_executor_gives_the_tokens_of_the_torch_path(sampled: bool) -> None:
    options: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "seed": 11} if sampled else {}
    by_torch, memory = torch_executor(tiny_llama(), Memory()), Memory()
    library = best_library()
    forward = choose_forward(tiny_llama(), LLAMA_LAYOUT, device="cpu", check=True, max_model_len=None, library=library)
    assert isinstance(forward, NativeForward)
    view = KvCacheView.over_region(layout=LLAMA_LAYOUT, address=memory.blocks_address, blocks=memory.blocks, device="cpu")
    by_native = TorchExecutor(forward, view)
    by_native.prepare_thread(2)
    for length in (1, 4, 33):
        prompt = prompt_of(length)
        expected = generate(by_torch, started(1, prompt, **options), range(40), 20)
        assert generate(by_native, started(1, prompt, **options), range(40), 20) == expected
    if not sampled:
        assert generate(by_native, started(1, prompt_of(33)), range(40), 20, chunks=(5, 9, 18)) == expected


def test_not_a_number_in_one_cache_is_the_fault_of_one_row() -> None:
    memory, library = Memory(), best_library()
    forward = choose_forward(tiny_llama(), LLAMA_LAYOUT, device="cpu", check=False, max_model_len=None, library=library)
    view = KvCacheView.over_region(layout=LLAMA_LAYOUT, address=memory.blocks_address, blocks=memory.blocks, device="cpu")
    executor = TorchExecutor(forward, view)
    alone = generate(executor, started(9, prompt_of(12)), range(100, 110), 2)
    starts = [started(handle, prompt_of(12)) for handle in (1, 2)]
    run(executor, chunk(1, 0, 11, range(4), sample=False), chunk(2, 0, 11, range(4, 8), sample=False), starts=starts)
    view.data[5] = float("nan")
    good, bad = run(executor, chunk(1, 11, 1, range(4)), chunk(2, 11, 1, range(4, 8)))
    assert token_of(good) == alone[0]
    assert bad.fault is not None


def test_a_model_that_does_not_fit_runs_in_torch_and_one_that_lies_is_refused() -> None:
    library = best_library()
    other = random_model(transformers.GPT2Config(vocab_size=199, n_embd=64, n_layer=4, n_head=4))
    layout = KvLayout(layers=4, kv_heads=4, head_dim=16, block_size=4)
    made = choose_forward(other, layout, device="cpu", check=True, max_model_len=None, library=library)
    assert isinstance(made, TransformersForward)
    wrong = build("LlamaConfig")
    wrong.model.layers[2].mlp.register_forward_hook(lambda module, args, output: output * 1.01)  # type: ignore[union-attr,index]
    with pytest.raises(ModelError, match="LlamaForCausalLM"):
        choose_forward(wrong, layout_of(wrong, "float32"), device="cpu", check=True, max_model_len=None, library=library)


@pytest.mark.parametrize(("change", "word"), [({"hidden_act": "gelu"}, "gelu"), ({"head_dim": 8}, "heads of 8")])
def test_what_does_not_fit_is_named(change: dict[str, object], word: str) -> None:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16
    )
    for name, value in change.items():
        setattr(config, name, value)
    assert word in (misfit(random_model(config)) or "")


def test_weights_are_dropped_as_they_are_taken_over() -> None:
    model = build("Qwen3Config")
    LlamaModel(best_library(), model, consume=True)
    left = [name for name, parameter in model.named_parameters() if parameter.dim() > 1 and parameter.numel()]
    assert left == []
