"""How the tensors of a GGUF file become those of a transformers model: names, order of rows, offsets.

The GGUF writers (llama.cpp's converter) rename tensors, reorder the rows of Llama's q and k for their rotary kernel, and
add 1 to Gemma's norm weights. Undoing this is exact: no number changes but those where 1 is subtracted again.
"""

from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np
import numpy.typing as npt

from common.engine.gguf_reader import GgufFile
from common.engine.safetensors_file import TensorToWrite
from common.values.errors import ModelError

_BASE = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PRE_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_FUSED = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_SANDWICH_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm", **_POST_NORMS}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_COMPUTED = ("rope_freqs.weight",)
"""Tensors that say something about the configuration and are no weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRules:
    """`layer` maps a GGUF layer part to transformers' module; each of them must be there in every layer."""

    layer: dict[str, str]
    permuted: bool = False
    norm_offset: float = 0.0


_RULES = {
    "llama": TensorRules(layer=_BASE | _PRE_NORMS, permuted=True),
    "qwen2": TensorRules(layer=_BASE | _PRE_NORMS),
    "qwen3": TensorRules(layer=_BASE | _PRE_NORMS | _HEAD_NORMS),
    "olmo2": TensorRules(layer=_BASE | _HEAD_NORMS | _POST_NORMS),
    "phi3": TensorRules(layer=_FUSED | _PRE_NORMS),
    "gemma": TensorRules(layer=_BASE | _PRE_NORMS, norm_offset=1.0),
    "gemma2": TensorRules(layer=_BASE | _SANDWICH_NORMS, norm_offset=1.0),
    "gemma3": TensorRules(layer=_BASE | _SANDWICH_NORMS | _HEAD_NORMS, norm_offset=1.0),
}
SUPPORTED_ARCHITECTURES = tuple(_RULES)


def tensors_to_write(file: GgufFile) -> list[TensorToWrite]:
    """Every weight of the file under its transformers name, computed only when it is written.

    Raises ModelError where a tensor is missing, or is one that this architecture does not have.
    """
    architecture = file.text("general.architecture")
    rules = _RULES[architecture]
    names = _expected_names(file, rules, layers=file.integer(f"{architecture}.block_count"))
    unknown = [name for name in file.tensors if name not in names and name not in _COMPUTED]
    if unknown:
        raise ModelError(f"{file.path}: {architecture} has no tensor {unknown[0]} ({len(unknown)} such): use the model's safetensors")
    heads = file.integer(f"{architecture}.attention.head_count")
    kv_heads = file.integer(f"{architecture}.attention.head_count_kv", heads)
    return [
        TensorToWrite(name=names[name], shape=file.tensors[name].shape, make=partial(_restored, file, name, rules, heads, kv_heads))
        for name in file.tensors
        if name in names
    ]


def unwritten_tie(file: GgufFile) -> bool:
    """Whether the output layer shares the embedding's weights, which then are stored once."""
    return "output.weight" not in file.tensors


def parameter_bytes(file: GgufFile) -> int:
    return 4 * sum(prod(tensor.shape) for tensor in file.tensors.values())


def _expected_names(file: GgufFile, rules: TensorRules, *, layers: int) -> dict[str, str]:
    """GGUF names of this file mapped to transformers names. Biases are taken where they exist."""
    modules = dict(_TOP)
    for layer in range(layers):
        modules |= {f"blk.{layer}.{part}": f"model.layers.{layer}.{module}" for part, module in rules.layer.items()}
    missing = [f"{part}.weight" for part in modules if part != "output" and f"{part}.weight" not in file.tensors]
    if missing:
        raise ModelError(f"{file.path} lacks the tensor {missing[0]} ({len(missing)} are missing): fetch a whole file")
    names = {f"{part}.{kind}": f"{module}.{kind}" for part, module in modules.items() for kind in ("weight", "bias")}
    return {name: target for name, target in names.items() if name in file.tensors}


def _restored(file: GgufFile, name: str, rules: TensorRules, heads: int, kv_heads: int) -> npt.NDArray[np.float32]:
    """Read one tensor and undo what the GGUF writer did to it."""
    values = file.read(name)
    part = name.rsplit(".", 2)[-2]
    if rules.permuted and part in ("attn_q", "attn_k"):
        return unpermute_rows(values, heads if part == "attn_q" else kv_heads)
    if rules.norm_offset and part.endswith("_norm"):
        return values - np.float32(rules.norm_offset)
    return values


def unpermute_rows(values: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """From rotary pairs next to each other (GGUF) to rotary halves (transformers), head by head.

    Takes the weight `[heads * head_dim, inputs]` or the bias `[heads * head_dim]` of a projection.
    """
    pairs = values.shape[0] // heads // 2
    split = values.reshape(heads, pairs, 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)
