"""Loading into torch: every family from random weights, and GGUF files against the model that they were written from."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from common.engine.gguf_tensors import SUPPORTED_ARCHITECTURES
from common.engine.load_model import load_model
from common.engine.memory_plan import kv_layout, parameter_count
from common.engine.model_card import model_card
from common.engine.model_files import ModelFolder
from common.engine.model_source import ModelSpec, resolve_model
from common.engine.tokenizer_of_bytes import byte_tokenizer
from common.values.errors import ModelError
from tests.tiny_models import GgufMaker, permute_rows, write_folder

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "smollm3", "olmo2", "phi3", "gemma", "gemma2", "gemma3_text")
UNIFORM_HEADS = ("qwen2", "olmo2", "phi3", "smollm3")
"""These compute the head's size from hidden size and heads."""
PROMPT = torch.tensor([[5, 17, 200, 31, 9, 9, 250]])


def tiny_config(model_type: str, **more: object) -> dict[str, object]:
    config: dict[str, object] = {"model_type": model_type, **SIZES, **more}
    if model_type in UNIFORM_HEADS:
        config["head_dim"] = 16
    return config


def dummy(tmp_path: Path, model_type: str) -> ModelFolder:
    path = tmp_path / f"{model_type}.json"
    path.write_text(json.dumps(tiny_config(model_type)), encoding="utf-8")
    return resolve_model(ModelSpec(model=str(path), load_format="dummy"), tmp_path / "cache")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_loads_with_equal_random_weights_in_each_process(tmp_path: Path, model_type: str) -> None:
    folder = dummy(tmp_path, model_type)
    torch.manual_seed(1)
    one = load_model(folder, dtype="float32")
    torch.manual_seed(2)
    two = load_model(folder, dtype="float32")
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    layout = kv_layout(folder.config(), "float32", 16)
    attention = next(module for name, module in one.named_modules() if name.endswith("self_attn"))
    projected = attention.k_proj.out_features if hasattr(attention, "k_proj") else 2 * 16
    assert layout.kv_heads * layout.head_dim == projected
    with torch.inference_mode():
        assert torch.isfinite(one(input_ids=PROMPT).logits).all()


def test_random_weights_have_a_card_with_a_tokenizer_of_bytes(tmp_path: Path) -> None:
    card = model_card(dummy(tmp_path, "llama"), cache_dir=tmp_path / "cache", max_model_len=128)
    assert (card.model.name, card.max_model_len, card.eos_token_ids) == ("llama", 128, (2,))
    assert card.chat_template is None
    assert card.model.revision != model_card(dummy(tmp_path, "qwen2"), cache_dir=tmp_path / "cache").model.revision


def test_the_memory_estimate_counts_llamas_parameters(tmp_path: Path) -> None:
    folder = dummy(tmp_path, "llama")
    loaded = sum(parameter.numel() for parameter in load_model(folder, dtype="float32").parameters())
    assert parameter_count(folder.config()) + SIZES["hidden_size"] == loaded


def saved(tmp_path: Path) -> ModelFolder:
    model = load_model(dummy(tmp_path, "llama"), dtype="float32")
    assert isinstance(model, transformers.PreTrainedModel)
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text(byte_tokenizer(320).to_str(), encoding="utf-8")
    return resolve_model(ModelSpec(model=str(tmp_path / "m")), tmp_path / "cache")


def test_a_folder_that_transformers_saved_loads_in_each_dtype(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    full, half = load_model(folder, dtype="float32"), load_model(folder, dtype="bfloat16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in full.parameters())
    assert not full.training
    for (name, one), other in zip(full.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(one.to(torch.bfloat16), other), name


def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", tiny_config("llama"))
    with pytest.raises(ModelError, match="missing keys"):
        load_model(resolve_model(ModelSpec(model=str(folder)), tmp_path / "cache"), dtype="float32")


def test_a_tensor_of_the_wrong_size_is_named_with_both_sizes(tmp_path: Path) -> None:
    config_path = saved(tmp_path).path / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config_path.write_text(json.dumps({**config, "intermediate_size": 95}), encoding="utf-8")
    folder = resolve_model(ModelSpec(model=str(config_path.parent)), tmp_path / "cache")
    with pytest.raises(ModelError, match=r"weight, which is \[\d+, \d+\] instead of \["):
        load_model(folder, dtype="float32")


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ModelError, match="CUDA"):
        load_model(dummy(tmp_path, "llama"), dtype="float32", device="cuda")


BASE = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_tensor_name(name: str, *, post_norms: bool) -> str:
    """The name that llama.cpp's converter gives a tensor of transformers."""
    tops = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module, _, kind = name.rpartition(".")
    if module in tops:
        return f"{tops[module]}.{kind}"
    _, _, layer, part = module.split(".", 3)
    names = {**BASE, "post_attention_layernorm": "post_attention_norm" if post_norms else "ffn_norm"}
    return f"blk.{layer}.{names[part]}.{kind}"


def write_gguf(path: Path, architecture: str, state: Mapping[str, torch.Tensor], *, head_dim: int, tied: bool) -> Path:
    """As llama.cpp's converter writes this architecture: Llama's q and k permuted, 1 added to Gemma's norms."""
    maker = GgufMaker(path, architecture).integers(
        block_count=2,
        context_length=256,
        embedding_length=64,
        feed_forward_length=96,
        attention__head_count=4,
        attention__head_count_kv=2,
        attention__key_length=head_dim,
        attention__value_length=head_dim,
        rope__dimension_count=head_dim,
    )
    maker.numbers(attention__layer_norm_rms_epsilon=1e-6, rope__freq_base=10000.0).byte_vocabulary(size=320, pre="qwen2")
    post_norms = any(name.endswith("post_feedforward_layernorm.weight") for name in state)
    for name, tensor in state.items():
        if tied and name == "lm_head.weight":
            continue
        values = tensor.numpy().astype(np.float32)
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            values = permute_rows(values, 4 if "q_proj" in name else 2)
        if architecture.startswith("gemma") and "norm" in name:
            values = values + np.float32(1)
        maker.tensor(gguf_tensor_name(name, post_norms=post_norms), values)
    return maker.write()


@pytest.mark.parametrize("architecture", SUPPORTED_ARCHITECTURES)
def test_a_gguf_file_computes_what_its_origin_computes(tmp_path: Path, architecture: str) -> None:
    model_type = "gemma3_text" if architecture == "gemma3" else architecture
    origin_config = tiny_config(model_type, rms_norm_eps=1e-6, **({"attention_bias": True} if architecture == "llama" else {}))
    if architecture in ("gemma2", "gemma3"):
        origin_config["query_pre_attn_scalar"] = 32
    if architecture == "gemma3":
        origin_config |= {"rope_theta": 10000.0, "rope_local_base_freq": 10000.0}
    (tmp_path / "origin.json").write_text(json.dumps(origin_config), encoding="utf-8")
    made = resolve_model(ModelSpec(model=str(tmp_path / "origin.json"), load_format="dummy"), tmp_path / "cache")
    torch.manual_seed(3)
    origin = load_model(made, dtype="float32")
    for name, parameter in origin.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    state = {name: tensor.detach() for name, tensor in origin.state_dict().items()}
    tied = state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    path = write_gguf(tmp_path / "tiny.gguf", architecture, state, head_dim=int(str(origin_config["head_dim"])), tied=tied)
    loaded = load_model(resolve_model(ModelSpec(model=str(path)), tmp_path / "cache"), dtype="float32")
    with torch.inference_mode():
        expected, found = origin(input_ids=PROMPT).logits, loaded(input_ids=PROMPT).logits
    assert torch.allclose(expected, found, atol=2e-5), float((expected - found).abs().max())
