"""Which architectures pass the self-check, and that it sees what it is there for. Tiny random models, each with what is special
of its kind switched on: sliding windows shorter than the prompt, soft-capping, sinks."""

from typing import Any

import pytest
import torch
import transformers

from common.engine import paged_attention
from common.engine.paged_attention import PAGED_ATTENTION
from common.engine.self_check import self_check
from common.values.errors import ModelError
from common.values.kv_layout import KvLayout
from tests.step_engines import random_model

COMMON: dict[str, Any] = {
    "vocab_size": 199, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LAYOUT = KvLayout(layers=4, kv_heads=2, head_dim=16, block_size=4)
MIXED_LAYERS: dict[str, Any] = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
SUPPORTED: dict[str, dict[str, Any]] = {
    "LlamaConfig": {},
    "Qwen2Config": {},
    "Qwen3Config": {},
    "MistralConfig": {"sliding_window": 8},
    "GemmaConfig": {},
    "Gemma2Config": {"sliding_window": 8, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 16},
    "Gemma3TextConfig": {**MIXED_LAYERS, "query_pre_attn_scalar": 16},
    "Olmo2Config": {},
    "Olmo3Config": MIXED_LAYERS,
    "Phi3Config": {"sliding_window": 8},
    "SmolLM3Config": {},
    "MixtralConfig": {"num_local_experts": 4},
    "GraniteConfig": {},
    "GptOssConfig": {
        **MIXED_LAYERS,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}
OLDER: dict[str, Any] = {"vocab_size": 199, "hidden_size": 64, "n_layer": 4, "n_head": 4}
REFUSED: dict[str, dict[str, Any]] = {
    "BloomConfig": OLDER,
    "FalconConfig": {"vocab_size": 199, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4},
    "GPTJConfig": {"vocab_size": 199, "n_embd": 64, "n_layer": 4, "n_head": 4, "rotary_dim": 16, "bos_token_id": 1, "eos_token_id": 2},
    "MambaConfig": {"vocab_size": 199, "hidden_size": 64, "num_hidden_layers": 4},
}


def build(config: str, options: dict[str, Any]) -> torch.nn.Module:
    return random_model(getattr(transformers, config)(**options))


@pytest.mark.parametrize("config", SUPPORTED)
def test_architectures_that_are_served(config: str) -> None:
    model = build(config, {**COMMON, **SUPPORTED[config]})
    self_check(model, LAYOUT)
    assert getattr(model.config, "_attn_implementation", None) == PAGED_ATTENTION


@pytest.mark.parametrize("config", REFUSED)
def test_architectures_that_attend_in_another_way_are_refused_by_name(config: str) -> None:
    model = build(config, REFUSED[config])
    with pytest.raises(ModelError, match=type(model).__name__):
        self_check(model, KvLayout(layers=4, kv_heads=4, head_dim=16, block_size=4))


@pytest.mark.parametrize(
    ("config", "ignored"),
    [("MistralConfig", "sliding_window"), ("Gemma2Config", "softcap"), ("GptOssConfig", "s_aux"), ("Gemma3TextConfig", "scaling")],
)
def test_attention_that_ignores_an_option_is_noticed(config: str, ignored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**COMMON, **SUPPORTED[config]}
    if ignored == "scaling":
        options["query_pre_attn_scalar"] = 64
    original = paged_attention.paged_attention

    def forgetful(*args: Any, **keywords: Any) -> tuple[torch.Tensor, None]:
        return original(*args, **{**keywords, ignored: None})

    monkeypatch.setattr(paged_attention, "paged_attention", forgetful)
    try:
        with pytest.raises(ModelError, match="standard deviations"):
            self_check(build(config, options), LAYOUT)
    finally:
        monkeypatch.undo()
        paged_attention.register_paged_attention()


def test_a_layout_of_another_shape_is_refused() -> None:
    with pytest.raises(ModelError, match="LlamaForCausalLM"):
        self_check(build("LlamaConfig", COMMON), KvLayout(layers=4, kv_heads=4, head_dim=16))


def test_rotary_embeddings_that_look_at_the_batch_are_refused() -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ModelError, match="dynamic"):
        self_check(build("LlamaConfig", {**COMMON, "rope_parameters": dynamic}), LAYOUT)
    long = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 128,
    }  # fmt: skip
    model = build("Phi3Config", {**COMMON, "hidden_size": 64, "original_max_position_embeddings": 128, "rope_parameters": long})
    with pytest.raises(ModelError, match="--max-model-len 128"):
        self_check(model, LAYOUT, max_model_len=256)
    self_check(model, LAYOUT, max_model_len=128)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_passes(dtype: Any) -> None:
    model = build("LlamaConfig", COMMON).to(getattr(torch, dtype))
    self_check(model, KvLayout(layers=4, kv_heads=2, head_dim=16, block_size=4, dtype=dtype))
