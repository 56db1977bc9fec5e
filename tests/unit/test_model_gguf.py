"""Reading GGUF: equal to the gguf package's own reader, and never more than a sentence for a damaged file."""

import contextlib
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from common.engine.gguf_config import llama3_divisors, refuse_unsupported, transformers_config
from common.engine.gguf_conversion import convert, converted_folder
from common.engine.gguf_reader import GgufFile
from common.engine.gguf_tensors import unpermute_rows
from common.engine.model_cache import no_progress
from common.engine.model_files import open_folder
from common.values.errors import ModelError
from tests.tiny_models import GgufMaker, permute_rows, tiny_llama_gguf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf")


def test_equal_to_the_packages_reader(tiny: Path) -> None:
    ours, theirs = GgufFile(tiny), gguf.GGUFReader(str(tiny))
    assert set(ours.tensors) == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        assert np.array_equal(ours.read(tensor.name), gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    tokens = theirs.get_field("tokenizer.ggml.tokens")
    assert tokens is not None
    assert ours.texts("tokenizer.ggml.tokens") == tokens.contents()
    assert ours.integer("llama.block_count") == 2
    assert ours.number("llama.attention.layer_norm_rms_epsilon") == 1e-5


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_cut_off_file_is_refused(tiny: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = tiny.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ModelError, match=r"cut\.gguf"):
        GgufFile(path)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_header_converts_or_is_refused(tiny: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(tiny.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 12_000))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    folder = tmp_path / "out"
    folder.mkdir(exist_ok=True)
    with contextlib.suppress(ModelError):
        convert(path, folder, no_progress)


def test_more_layers_than_there_are_tensors_are_refused_at_once(tmp_path: Path) -> None:
    maker = GgufMaker(tmp_path / "a.gguf", "llama").integers(block_count=2**31 - 1, attention__head_count=1)
    path = maker.tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32)).write()
    with pytest.raises(ModelError, match=r"2147483647 layers, and holds 1 tensors"):
        convert(path, tmp_path, no_progress)


def test_a_missing_tensor_and_an_unknown_one_are_named(tmp_path: Path) -> None:
    maker = GgufMaker(tmp_path / "a.gguf", "llama").integers(block_count=1, attention__head_count=1)
    path = maker.tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32)).write()
    with pytest.raises(ModelError, match=r"lacks the tensor .*output_norm|lacks the tensor blk\.0"):
        convert(path, tmp_path, no_progress)


def test_an_architecture_that_is_not_read_names_the_way_out(tmp_path: Path) -> None:
    path = GgufMaker(tmp_path / "a.gguf", "mamba").integers(block_count=1).write()
    with pytest.raises(ModelError, match=r"mamba.*llama, qwen2.*safetensors"):
        refuse_unsupported(GgufFile(path))


def test_unpermuting_undoes_what_the_writer_did() -> None:
    rows = np.arange(24 * 5, dtype=np.float32).reshape(24, 5)
    assert np.array_equal(unpermute_rows(permute_rows(rows, 3), 3), rows)
    assert not np.array_equal(permute_rows(rows, 3), rows)
    assert np.array_equal(unpermute_rows(permute_rows(rows[:, 0], 3), 3), rows[:, 0])


def test_llama3_rotary_scaling_is_recognised_by_its_divisors(tmp_path: Path) -> None:
    def file(divisors: list[float]) -> GgufFile:
        maker = GgufMaker(tmp_path / "a.gguf", "llama").integers(
            block_count=1, context_length=9, embedding_length=64, feed_forward_length=9, attention__head_count=1
        )
        maker.numbers(attention__layer_norm_rms_epsilon=1e-5, rope__freq_base=500000.0)
        maker.tensor("token_embd.weight", np.zeros((4, 64), dtype=np.float32))
        return GgufFile(maker.tensor("rope_freqs.weight", np.array(divisors, dtype=np.float32)).write())

    scaling = transformers_config(file(llama3_divisors(500000.0, 64, 8.0)))["rope_scaling"]
    assert isinstance(scaling, dict)
    assert (scaling["rope_type"], scaling["factor"]) == ("llama3", 8.0)
    assert transformers_config(file([1.0] * 32))["rope_scaling"] is None
    with pytest.raises(ModelError, match="rotary scaling"):
        transformers_config(file([1.0] * 31 + [8.0]))


def test_a_converted_folder_that_was_damaged_is_made_again(tiny: Path, tmp_path: Path) -> None:
    first = converted_folder(tiny, tmp_path, no_progress)
    weights = first / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    assert converted_folder(tiny, tmp_path, no_progress) == first
    assert weights.read_bytes() == content


def test_the_converted_folder_is_a_whole_model(tiny: Path, tmp_path: Path) -> None:
    folder = open_folder(converted_folder(tiny, tmp_path, no_progress), name="tiny", dummy=False)
    config = folder.config()
    assert (config.layers, config.heads, config.kv_heads, config.vocab_size, config.tied_embeddings) == (2, 4, 2, 300, True)
    names = {header.name for header in folder.tensor_headers()}
    assert "lm_head.weight" not in names
    assert "model.layers.1.self_attn.q_proj.weight" in names
    assert len(names) == 20
    tokenizer = Tokenizer.from_file(str(folder.path / "tokenizer.json"))
    ids = tokenizer.encode("<|im_start|>hello 12<|im_end|>").ids
    assert tokenizer.decode(ids) == "hello 12"
    assert config.eos_token_ids == (ids[-1],)
