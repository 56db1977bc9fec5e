"""How the tensors of a GGUF file become those of a transformers model: names, order of rows, offsets.

The GGUF writers (llama.cpp's converter) rename tensors, reorder the rows of Llama's q and k for their rotary kernel, and
add 1 to Gemma's norm weights. Undoing this is exact: no number changes but those where 1 is subtracted again.
"""

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from common.engine.gguf_reader import GgufFile
from common.engine.quantized_matrix import BlockKind
from common.engine.safetensors_file import TensorToWrite
from common.values.errors import ModelError

Number = TypeVar("Number", np.float32, np.uint8)

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
    names = _names_of(file)
    unknown = [name for name in file.tensors if name not in names and name not in _COMPUTED]
    if unknown:
        raise ModelError(f"{file.path}: {architecture} has no tensor {unknown[0]} ({len(unknown)} such): use the model's safetensors")
    return [
        TensorToWrite(name=names[name], shape=file.tensors[name].shape, make=partial(_restored, file, name, rules))
        for name in file.tensors
        if name in names
    ]


def quantized_to_write(file: GgufFile) -> tuple[list[TensorToWrite], dict[str, BlockKind]]:
    """The matrices that the kernels can multiply with as they are stored, rows of blocks in the order of `tensors_to_write`, and
    the kind of each."""
    rules, names = _RULES[file.text("general.architecture")], _names_of(file)
    kinds = {int(kind) for kind in BlockKind}
    chosen = {
        name: tensor
        for name, tensor in file.tensors.items()
        if name in names and tensor.quantization in kinds and len(tensor.shape) == 2
    }
    tensors = [
        TensorToWrite(
            name=names[name],
            shape=(tensor.shape[0], BlockKind(tensor.quantization).row_bytes(tensor.shape[1])),
            make=partial(_blocks, file, name, rules),
            dtype="U8",
        )
        for name, tensor in chosen.items()
    ]
    return tensors, {names[name]: BlockKind(tensor.quantization) for name, tensor in chosen.items()}


def unwritten_tie(file: GgufFile) -> bool:
    """Whether the output layer shares the embedding's weights, which then are stored once."""
    return "output.weight" not in file.tensors


def parameter_bytes(file: GgufFile) -> int:
    return 4 * sum(prod(tensor.shape) for tensor in file.tensors.values())


def _names_of(file: GgufFile) -> dict[str, str]:
    architecture = file.text("general.architecture")
    layers = file.integer(f"{architecture}.block_count")
    if not 0 < layers <= len(file.tensors):
        raise ModelError(f"{file.path} says that it has {layers} layers, and holds {len(file.tensors)} tensors: fetch it again")
    return _expected_names(file, _RULES[architecture], layers=layers)


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


def _restored(file: GgufFile, name: str, rules: TensorRules) -> npt.NDArray[np.float32]:
    """Read one tensor and undo what the GGUF writer did to it."""
    values = file.read(name)
    if (heads := _permuted_heads(file, name, rules)) is not None:
        return unpermute_rows(values, heads)
    if rules.norm_offset and _part(name).endswith("_norm"):
        return values - np.float32(rules.norm_offset)
    return values


def _blocks(file: GgufFile, name: str, rules: TensorRules) -> npt.NDArray[np.uint8]:
    """A matrix's rows of blocks in transformers' order: blocks lie along a row, so a row moves as a whole."""
    rows, heads = file.stored(name), _permuted_heads(file, name, rules)
    return rows if heads is None else unpermute_rows(rows, heads)


def _part(name: str) -> str:
    return name.rsplit(".", 2)[-2]


def _permuted_heads(file: GgufFile, name: str, rules: TensorRules) -> int | None:
    """How many heads' rows of this tensor the writer has reordered."""
    part, architecture = _part(name), file.text("general.architecture")
    if not rules.permuted or part not in ("attn_q", "attn_k"):
        return None
    heads = file.integer(f"{architecture}.attention.head_count")
    return heads if part == "attn_q" else file.integer(f"{architecture}.attention.head_count_kv", heads)


def unpermute_rows(values: npt.NDArray[Number], heads: int) -> npt.NDArray[Number]:
    """From rotary pairs next to each other (GGUF) to rotary halves (transformers), head by head.

    Takes the weight `[heads * head_dim, inputs]` or the bias `[heads * head_dim]` of a projection.
    """
    pairs = values.shape[0] // heads // 2
    split = values.reshape(heads, pairs, 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)
