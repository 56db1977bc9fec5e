"""From GGUF metadata to the configuration that transformers reads, for the architectures whose tensors we can restore.

What a GGUF file does not carry (some constants of Gemma, the shape of Llama 3's rotary scaling) is computed by the same rules as
the programs that run GGUF files use, and refused where it cannot be known for sure.
"""

import math

import numpy as np

from common.engine.gguf_reader import GgufFile
from common.engine.gguf_tensors import SUPPORTED_ARCHITECTURES, unwritten_tie
from common.values.errors import ModelError

ConfigValue = str | int | float | bool | None | dict[str, str | int | float] | list[str]
_CLASSES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "olmo2": ("Olmo2ForCausalLM", "olmo2"),
    "phi3": ("Phi3ForCausalLM", "phi3"),
    "gemma": ("GemmaForCausalLM", "gemma"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
_GEMMA2_27B_LAYERS = 46
_GEMMA3_27B_LAYERS = 62


def refuse_unsupported(file: GgufFile) -> None:
    """Raises ModelError, saying what to use instead, for what would not be exact."""
    architecture = file.text("general.architecture")
    if architecture not in SUPPORTED_ARCHITECTURES:
        known = ", ".join(SUPPORTED_ARCHITECTURES)
        raise ModelError(
            f"{file.path} is a GGUF file of {architecture}; Segue reads GGUF of {known}. Use the model's safetensors folder"
        )
    if file.optional_integer(f"{architecture}.expert_count"):
        raise ModelError(
            f"{file.path} is a mixture of experts; Segue does not read those from GGUF. Use the model's safetensors folder"
        )
    if any(name.startswith("rope_factors_") for name in file.tensors):
        raise ModelError(f"{file.path} has long-context rotary factors, not read from GGUF. Use the model's safetensors folder")


def transformers_config(file: GgufFile) -> dict[str, ConfigValue]:
    """The content of `config.json`. Call `refuse_unsupported` first."""
    architecture = file.text("general.architecture")
    class_name, model_type = _CLASSES[architecture]
    heads = file.integer(f"{architecture}.attention.head_count")
    hidden = file.integer(f"{architecture}.embedding_length")
    head_dim = file.integer(f"{architecture}.attention.key_length", hidden // max(1, heads))
    vocab_size, width = file.tensors["token_embd.weight"].shape
    if width != hidden:
        raise ModelError(f"{file.path}: the embedding has {width} columns, the model {hidden}: the file is damaged")
    config: dict[str, ConfigValue] = {
        "architectures": [class_name],
        "model_type": model_type,
        "dtype": "float32",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": file.integer(f"{architecture}.feed_forward_length"),
        "num_hidden_layers": file.integer(f"{architecture}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.integer(f"{architecture}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.integer(f"{architecture}.context_length"),
        "rms_norm_eps": file.number(f"{architecture}.attention.layer_norm_rms_epsilon"),
        "rope_theta": file.number(f"{architecture}.rope.freq_base", 10000.0),
        "tie_word_embeddings": unwritten_tie(file),
        "bos_token_id": file.optional_integer("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.optional_integer("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.optional_integer("tokenizer.ggml.padding_token_id"),
        "rope_scaling": _rope_scaling(file, architecture, head_dim),
    }
    _refuse_other_head_sizes(file, architecture, head_dim)
    return {**config, **_biases(file, architecture), **_specialities(file, architecture, head_dim)}


def _refuse_other_head_sizes(file: GgufFile, architecture: str, head_dim: int) -> None:
    value_length = file.integer(f"{architecture}.attention.value_length", head_dim)
    if value_length != head_dim or head_dim < 1:
        raise ModelError(f"{file.path}: keys of {head_dim} and values of {value_length} numbers a head cannot be served")


def _biases(file: GgufFile, architecture: str) -> dict[str, ConfigValue]:
    if architecture != "llama":
        return {}
    return {"attention_bias": "blk.0.attn_q.bias" in file.tensors, "mlp_bias": "blk.0.ffn_up.bias" in file.tensors}


def _specialities(file: GgufFile, architecture: str, head_dim: int) -> dict[str, ConfigValue]:
    """What one family has and the others lack."""
    window = file.optional_integer(f"{architecture}.attention.sliding_window")
    rotary = file.integer(f"{architecture}.rope.dimension_count", head_dim)
    if architecture == "phi3":
        return {"sliding_window": window or None, "partial_rotary_factor": rotary / head_dim}
    if rotary != head_dim:
        raise ModelError(f"{file.path}: only {rotary} of {head_dim} numbers a head are rotated; use the model's safetensors folder")
    if architecture == "gemma2":
        return {**_gemma(), **_gemma2(file, head_dim), "sliding_window": window or 4096}
    if architecture == "gemma3":
        return {**_gemma(), **_gemma3(file, head_dim), "sliding_window": window or 4096}
    return _gemma() if architecture == "gemma" else {}


def _gemma() -> dict[str, ConfigValue]:
    return {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh"}


def _gemma2(file: GgufFile, head_dim: int) -> dict[str, ConfigValue]:
    return {
        "attn_logit_softcapping": file.number("gemma2.attn_logit_softcapping", 50.0),
        "final_logit_softcapping": file.number("gemma2.final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _query_scalar(file, "gemma2", head_dim, averaged_at=_GEMMA2_27B_LAYERS),
    }


def _gemma3(file: GgufFile, head_dim: int) -> dict[str, ConfigValue]:
    return {
        "rope_local_base_freq": file.number("gemma3.rope.freq_base_swa", 10000.0),
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": _query_scalar(file, "gemma3", head_dim, averaged_at=_GEMMA3_27B_LAYERS),
    }


def _query_scalar(file: GgufFile, architecture: str, head_dim: int, *, averaged_at: int) -> int:
    """The 27B models scale queries by hidden size over heads, the smaller ones by the head's size."""
    if file.integer(f"{architecture}.block_count") != averaged_at:
        return head_dim
    return file.integer(f"{architecture}.embedding_length") // file.integer(f"{architecture}.attention.head_count")


def _rope_scaling(file: GgufFile, architecture: str, head_dim: int) -> dict[str, str | int | float] | None:
    if "rope_freqs.weight" in file.tensors:
        return _llama3_scaling(file, architecture, head_dim)
    kind = file.text(f"{architecture}.rope.scaling.type", "none")
    factor = file.number(f"{architecture}.rope.scaling.factor", file.number(f"{architecture}.rope.scale_linear", 1.0))
    if kind == "yarn":
        original = file.integer(f"{architecture}.rope.scaling.original_context_length")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    if kind not in ("none", "linear"):
        raise ModelError(f"{file.path}: the rotary scaling {kind} is not read from GGUF. Use the model's safetensors folder")
    return None if factor in (0.0, 1.0) else {"rope_type": "linear", "factor": factor}


def _llama3_scaling(file: GgufFile, architecture: str, head_dim: int) -> dict[str, str | int | float] | None:
    """Llama 3's scaling stands in the file as its result, one divisor a frequency; find the parameters that give it."""
    found = file.read("rope_freqs.weight")
    factor = float(found.max())
    if factor == 1.0:
        return None
    theta = file.number(f"{architecture}.rope.freq_base", 10000.0)
    if found.shape != (head_dim // 2,) or not np.allclose(found, llama3_divisors(theta, head_dim, factor), rtol=1e-3):
        raise ModelError(f"{file.path}: its rotary scaling is not Llama 3's. Use the model's safetensors folder")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def llama3_divisors(theta: float, head_dim: int, factor: float) -> list[float]:
    """Per frequency: 1 for short waves, `factor` for long ones, a smooth passage between (Llama 3.1's rule, 1/4/8192)."""
    divisors: list[float] = []
    for index in range(head_dim // 2):
        wave = 2 * math.pi * theta ** (2 * index / head_dim)
        if wave < 8192 / 4.0:
            divisors.append(1.0)
        elif wave > 8192 / 1.0:
            divisors.append(factor)
        else:
            smooth = (8192 / wave - 1.0) / (4.0 - 1.0)
            divisors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return divisors
