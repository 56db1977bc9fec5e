"""Tiny models on disk for tests: safetensors folders, and GGUF files as llama.cpp's converter would write them."""

import json
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from common.engine.safetensors_file import TensorToWrite, write_tensor_file

Array = npt.NDArray[np.float32]
LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "eos_token_id": 3,
}


def byte_characters() -> list[str]:
    """GPT-2's 256 characters for bytes, in byte order."""
    from tokenizers import pre_tokenizers

    printable = sorted(pre_tokenizers.ByteLevel.alphabet(), key=ord)
    plain = [c for c in printable if ord(c) < 256]
    others = iter(c for c in printable if ord(c) >= 256)
    return [chr(b) if chr(b) in plain else next(others) for b in range(256)]


def write_folder(path: Path, config: dict[str, object] | None = None, *, tensors: dict[str, Array] | None = None) -> Path:
    """A folder with config.json, model.safetensors and a tokenizer of bytes."""
    from common.engine.tokenizer_of_bytes import byte_tokenizer

    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or LLAMA_CONFIG), encoding="utf-8")
    (path / "tokenizer.json").write_text(byte_tokenizer(300).to_str(), encoding="utf-8")
    arrays = tensors or {"model.norm.weight": np.ones(64, dtype=np.float32)}
    write_tensor_file(path / "model.safetensors", [_to_write(name, array) for name, array in arrays.items()], lambda part: None)
    return path


def _to_write(name: str, array: Array) -> TensorToWrite:
    return TensorToWrite(name=name, shape=array.shape, make=lambda: array)


class GgufMaker:
    """Collects metadata and tensors, then writes one GGUF file."""

    def __init__(self, path: Path, architecture: str) -> None:
        self.path, self._architecture = path, architecture
        self._writer = gguf.GGUFWriter(str(path), architecture)

    def integers(self, **values: int) -> "GgufMaker":
        for name, value in values.items():
            self._writer.add_uint32(f"{self._architecture}.{name.replace('__', '.')}", value)
        return self

    def numbers(self, **values: float) -> "GgufMaker":
        for name, value in values.items():
            self._writer.add_float32(f"{self._architecture}.{name.replace('__', '.')}", value)
        return self

    def byte_vocabulary(self, *, size: int, merges: list[str] | None = None, pre: str = "smollm") -> "GgufMaker":
        """256 bytes, the merges' results, three control tokens `<|endoftext|>`, `<|im_start|>`, `<|im_end|>`, then padding."""
        merges = merges or ["h e"]
        tokens = [*byte_characters(), *(merge.replace(" ", "") for merge in merges)]
        kinds = [1] * len(tokens) + [3, 3, 3]
        tokens += ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        end = len(tokens) - 1
        kinds += [5] * (size - len(tokens))
        tokens += [f"[PAD{number}]" for number in range(len(tokens), size)]
        self._writer.add_tokenizer_model("gpt2")
        self._writer.add_tokenizer_pre(pre)
        self._writer.add_token_list(tokens)
        self._writer.add_token_types(kinds)
        self._writer.add_token_merges(merges)
        self._writer.add_bos_token_id(end - 1)
        self._writer.add_eos_token_id(end)
        self._writer.add_unk_token_id(end - 2)
        self._writer.add_add_bos_token(False)
        self._writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
        return self

    def scored_vocabulary(self, tokens: list[str], scores: list[float], kinds: list[int], *, prefix: bool) -> "GgufMaker":
        self._writer.add_tokenizer_model("llama")
        self._writer.add_token_list(tokens)
        self._writer.add_token_scores(scores)
        self._writer.add_token_types(kinds)
        self._writer.add_bos_token_id(1)
        self._writer.add_eos_token_id(2)
        self._writer.add_unk_token_id(0)
        self._writer.add_add_space_prefix(prefix)
        return self

    def tensor(self, name: str, values: Array, quantization: GGMLQuantizationType | None = None) -> "GgufMaker":
        if quantization is None:
            self._writer.add_tensor(name, np.ascontiguousarray(values))
        else:
            self._writer.add_tensor(name, gguf.quants.quantize(values, quantization), raw_dtype=quantization)
        return self

    def write(self) -> Path:
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_tensors_to_file()
        self._writer.close()
        return self.path


def permute_rows(values: Array, heads: int) -> Array:
    """What llama.cpp's converter does to q and k: rotary halves become neighbouring pairs."""
    half = values.shape[0] // heads // 2
    return values.reshape(heads, 2, half, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


_OTHER_KINDS = {
    (1, "attn_v"): GGMLQuantizationType.F16,
    (1, "attn_output"): GGMLQuantizationType.Q4_0,
    (1, "ffn_up"): GGMLQuantizationType.Q4_0,
    (1, "ffn_down"): GGMLQuantizationType.Q8_0,
}


def tiny_llama_gguf(path: Path) -> Path:
    """A whole two-layer Llama with random weights, quantised in several kinds as mixed files are."""
    rng = np.random.default_rng(7)

    def random(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32) * np.float32(0.1)

    maker = GgufMaker(path, "llama").integers(
        block_count=2,
        context_length=512,
        embedding_length=64,
        feed_forward_length=96,
        attention__head_count=4,
        attention__head_count_kv=2,
    )
    maker.numbers(attention__layer_norm_rms_epsilon=1e-5, rope__freq_base=10000.0).byte_vocabulary(size=300, merges=["h e", "l l"])
    maker.tensor("token_embd.weight", random(300, 64), GGMLQuantizationType.Q8_0).tensor("output_norm.weight", random(64))
    for layer in range(2):
        shapes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
        shapes |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
        for part, shape in shapes.items():
            kind = _OTHER_KINDS.get((layer, part), GGMLQuantizationType.Q4_1)
            maker.tensor(f"blk.{layer}.{part}.weight", random(*shape), kind)
        maker.tensor(f"blk.{layer}.attn_norm.weight", random(64)).tensor(f"blk.{layer}.ffn_norm.weight", random(64))
    return maker.write()
