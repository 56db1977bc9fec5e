"""The bundled model's conversion on the real file, and two processes that want the same conversion at once."""

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from common.engine.gguf_conversion import CONVERTER_VERSION
from common.engine.model_cache import default_cache_dir, file_digest, host_lock
from common.engine.model_card import model_card
from common.engine.model_files import ModelFolder
from common.engine.model_source import ModelSpec, bundled_file, resolve_model
from tests.tiny_models import tiny_llama_gguf

CHILD = """
import sys
from pathlib import Path
from common.engine.model_source import ModelSpec, resolve_model
folder = resolve_model(ModelSpec(model=sys.argv[1]), Path(sys.argv[2]), lambda what, part: print(what, part, flush=True))
print("at", folder.path, flush=True)
"""


def test_two_processes_that_start_at_once_convert_once(tmp_path: Path) -> None:
    source, cache = tiny_llama_gguf(tmp_path / "tiny.gguf"), tmp_path / "cache"
    key = f"{file_digest(source, cache)}-v{CONVERTER_VERSION}"
    command = [sys.executable, "-c", CHILD, str(source), str(cache)]
    with host_lock(cache, key, waiting=lambda: pytest.fail("nobody else holds this lock")):
        children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        for child in children:
            assert child.stdout is not None
            assert "waiting" in child.stdout.readline()
    outputs = [child.communicate(timeout=60)[0].splitlines() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sorted(any("converting" in line for line in lines) for lines in outputs) == [False, True]
    assert {lines[-1] for lines in outputs} == {f"at {cache / 'converted' / key}"}
    assert [path.name for path in (cache / "converted").iterdir()] == [key]


@pytest.fixture(scope="module")
def bundled() -> ModelFolder:
    return resolve_model(ModelSpec(), default_cache_dir(os.environ))


@pytest.fixture(scope="module")
def tokenizer(bundled: ModelFolder) -> Tokenizer:
    return Tokenizer.from_file(str(bundled.path / "tokenizer.json"))


@pytest.mark.model
def test_the_converted_weights_are_the_dequantised_ones(bundled: ModelFolder) -> None:
    """A tensor of each kind against the gguf package's reader; q and k head by head in transformers' order."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(bundled_file())).tensors}

    def origin(name: str) -> np.ndarray:
        return np.asarray(gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type), dtype=np.float32)

    with safe_open(str(bundled.weights[0]), framework="numpy") as weights:
        same = {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.norm.weight": "output_norm.weight",
            "model.layers.29.mlp.down_proj.weight": "blk.29.ffn_down.weight",
            "model.layers.3.self_attn.v_proj.weight": "blk.3.attn_v.weight",
            "model.layers.7.post_attention_layernorm.weight": "blk.7.ffn_norm.weight",
        }
        for name, source in same.items():
            assert np.array_equal(weights.get_tensor(name), origin(source)), name
        for name, part, heads in (("q_proj", "attn_q", 9), ("k_proj", "attn_k", 3)):
            found = weights.get_tensor(f"model.layers.11.self_attn.{name}.weight").reshape(heads, 64, 576)
            stored = origin(f"blk.11.{part}.weight").reshape(heads, 64, 576)
            assert np.array_equal(found[:, :32], stored[:, 0::2])
            assert np.array_equal(found[:, 32:], stored[:, 1::2])
        assert len(list(weights.keys())) == len(tensors) == 272


TEXTS = (
    "The year 2024, 3.14159 and 1000000 are numbers; so are ١٢٣ and ４５.",
    "Größe, naïveté, 東京都, Ελληνικά, עברית, हिन्दी, 👩‍👩‍👧‍👦🏳️‍🌈, a\u0301, \u200b, \ufeff, \x00\x07",
    "def f(x):\n\treturn x  +  1\r\n\r\n\n   # tabs\tand   spaces \n",
    "I'll say we've don't CAN'T <html> [INST] </s> <pad>",
    " leading and trailing ",
)


@pytest.mark.model
@pytest.mark.parametrize("text", [*TEXTS, "\n".join(TEXTS) * 200], ids=[*"abcde", "long"])
def test_the_bundled_tokenizer_round_trips(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    if len(text) < 1000:
        stream = DecodeStream(skip_special_tokens=False)
        assert "".join(stream.step(tokenizer, number) or "" for number in ids) == text


@pytest.mark.model
def test_the_bundled_tokenizer_cuts_between_digits(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("1234 5").tokens == ["1", "2", "3", "4", "Ġ", "5"]
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>").ids[0] == 1
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>").ids[-1] == 2


@pytest.mark.model
def test_the_bundled_models_card(bundled: ModelFolder) -> None:
    card = model_card(bundled, cache_dir=default_cache_dir(os.environ))
    assert (card.model.name, card.max_model_len, card.vocab_size) == ("SmolLM2-135M-Instruct", 8192, 49152)
    assert (card.eos_token_ids, card.bos_token_id, len(card.model.revision)) == ((2,), 1, 16)
    assert card.chat_template is not None
    assert "<|im_start|>" in card.chat_template
    assert card.special_tokens["eos_token"] == "<|im_end|>"
