"""Architectures outside the Llama family, in transformers' modules with our linears and our attention: tokens that do not
depend on their neighbours, to the last bit."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers

from common.engine.forward import ModelForward, TransformersForward
from common.engine.kv_cache_view import KvCacheView, torch_dtype
from common.engine.native.choose_forward import choose_forward
from common.engine.native.linear_modules import NativeLinear
from common.engine.paged_batch import BatchRow
from common.values.kv_layout import KvLayout
from tests.native_kernels import best_library
from tests.step_engines import random_model

COMMON: dict[str, Any] = {
    "vocab_size": 199, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MIXED: dict[str, Any] = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
OTHERS: dict[str, dict[str, Any]] = {
    "Gemma2Config": {**COMMON, "sliding_window": 8, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 16},
    "Gemma3TextConfig": {**COMMON, **MIXED, "query_pre_attn_scalar": 16},
    "Olmo2Config": COMMON,
    "Phi3Config": {**COMMON, "sliding_window": 8},
    "GraniteConfig": COMMON,
    "GPT2Config": {"vocab_size": 199, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256},
}


def build(name: str) -> tuple[torch.nn.Module, KvLayout]:
    model = random_model(getattr(transformers, name)(**OTHERS[name]))
    return model, KvLayout(layers=4, kv_heads=4 if name == "GPT2Config" else 2, head_dim=16, block_size=4)


def taken_over(model: torch.nn.Module, layout: KvLayout) -> ModelForward:
    return choose_forward(model, layout, device="cpu", check=True, max_model_len=None, library=best_library())


def empty_cache(layout: KvLayout) -> KvCacheView:
    shape = (80, layout.layers, 2, layout.kv_heads, layout.block_size, layout.head_dim)
    return KvCacheView(torch.full(shape, float("nan"), dtype=torch_dtype(layout)), layout)


def row(prompt: list[int], first: int, last: int, offset: int) -> BatchRow:
    return BatchRow(tokens=prompt[first:last], start=first, blocks=tuple(range(offset, 80, 3)), kept=range(last - first))


@pytest.mark.parametrize("name", OTHERS)
def test_logits_are_those_of_the_model_and_have_the_same_bits_in_any_batch(name: str) -> None:
    model, layout = build(name)
    prompts = [[(7919 * (place + 1) + 31 * i) % 199 for place in range(length)] for i, length in enumerate((60, 5, 33))]
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.inference_mode():
        expected = model(torch.tensor([prompts[0]]), use_cache=False).logits[0]
    forward = taken_over(model, layout)
    assert isinstance(forward, TransformersForward)
    assert sum(isinstance(module, NativeLinear) for module in model.modules()) > 4 * 3
    assert not any(isinstance(module, torch.nn.Linear) for module in model.modules())
    with torch.inference_mode():
        alone = [forward.logits(empty_cache(layout), [row(prompt, 0, len(prompt), 0)]) for prompt in prompts]
        assert float((alone[0] - expected).abs().max() / expected.std()) < 1e-3
        together = forward.logits(empty_cache(layout), [row(prompt, 0, len(prompt), i) for i, prompt in enumerate(prompts)])
        assert torch.equal(together, torch.cat(alone))
        cache = empty_cache(layout)
        cuts = [0, 7, 20, *range(21, 61)]
        parts = [forward.logits(cache, [row(prompts[0], first, last, 1)]) for first, last in pairwise(cuts)]
        assert torch.equal(torch.cat(parts), alone[0])


def test_experts_keep_working_with_our_attention() -> None:
    """Sinks, sliding windows, and experts that are no linear modules; choosing the forward compares them with eager."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    options = {**COMMON, **MIXED, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": rope}
    layout = KvLayout(layers=4, kv_heads=2, head_dim=16, block_size=4)
    torch.manual_seed(1)  # biases and sinks are drawn by the model itself
    model = random_model(transformers.GptOssConfig(**options))
    forward = taken_over(model, layout)
    with torch.inference_mode():
        logits = forward.logits(empty_cache(layout), [row([5] * 30, 0, 30, 0)])
    assert logits.isfinite().all()


def test_bf16_modules_stay_near_their_own_attention() -> None:
    model, layout = build("Olmo2Config")
    model, layout = model.bfloat16(), replace(layout, dtype="bfloat16")
    prompt = [(7919 * (place + 1)) % 199 for place in range(40)]
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.inference_mode():
        expected = model(torch.tensor([prompt]), use_cache=False).logits[0].float()
        forward = choose_forward(model, layout, device="cpu", check=False, max_model_len=None, library=best_library())
        actual = forward.logits(empty_cache(layout), [row(prompt, 0, 40, 0)])
    assert float((actual - expected).square().mean().sqrt() / expected.std()) < 0.1
