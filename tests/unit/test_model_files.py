"""Which folders are models, and that a cut-off or dangerous file is refused with a sentence."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from common.engine.model_cache import default_cache_dir, file_digest, publish_folder
from common.engine.model_card import model_card
from common.engine.model_files import folder_digest, open_folder
from common.engine.model_source import ModelSpec, bundled_file, gguf_name, resolve_model
from common.engine.safetensors_file import read_tensor_headers
from common.values.errors import ModelError
from tests.tiny_models import LLAMA_CONFIG, write_folder


def test_the_files_that_we_write_are_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.array([1.5], dtype=np.float32)}
    folder = write_folder(tmp_path / "m", tensors=tensors)
    loaded = load_file(folder / "model.safetensors")
    assert all(np.array_equal(loaded[name], values) for name, values in tensors.items())
    headers = {header.name: header.shape for header in read_tensor_headers(folder / "model.safetensors")}
    assert headers == {"a": (3, 4), "b": (1,)}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_cut_off_safetensors_file_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    whole = tmp_path / "whole.safetensors"
    if not whole.exists():
        save_file({"a": np.arange(64, dtype=np.float32)}, whole)
    content = whole.read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ModelError, match=r"cut\.safetensors"):
        read_tensor_headers(cut)


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", encoding="ascii")
    with pytest.raises(ModelError, match="git lfs pull"):
        read_tensor_headers(path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        open_folder(folder, name="m", dummy=False)
    with pytest.raises(ModelError, match="pickle"):
        resolve_model(ModelSpec(model=str(folder / "pytorch_model.bin")), tmp_path)


def test_a_missing_shard_is_counted(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match=r"two\.safetensors \(1 of 2"):
        open_folder(folder, name="m", dummy=False)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}), encoding="utf-8")
    with pytest.raises(ModelError, match="damaged"):
        open_folder(folder, name="m", dummy=False)


def test_code_of_a_model_is_refused_unless_transformers_has_its_own(tmp_path: Path) -> None:
    with_map = {**LLAMA_CONFIG, "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    open_folder(write_folder(tmp_path / "own", with_map), name="m", dummy=False)
    with pytest.raises(ModelError, match="never runs code"):
        open_folder(write_folder(tmp_path / "foreign", {**with_map, "model_type": "foreign_thing"}), name="m", dummy=False)


def test_a_model_without_a_tokenizer_file_says_how_to_make_one(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="save_pretrained"):
        open_folder(folder, name="m", dummy=False)
    assert open_folder(folder, name="m", dummy=True).dummy


@pytest.mark.parametrize("name", ["no/such/folder", "/no/such", "missing.gguf", "config.json"])
def test_a_name_that_is_nothing_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=name):
        resolve_model(ModelSpec(model=name), tmp_path)


def test_a_hub_name_without_a_network_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        resolve_model(ModelSpec(model="nobody/no-such-model"), tmp_path)


def test_the_revision_is_a_digest_of_content_alone(tmp_path: Path) -> None:
    one = open_folder(write_folder(tmp_path / "one"), name="a", dummy=False)
    two = open_folder(write_folder(tmp_path / "two"), name="b", dummy=False)
    cache = tmp_path / "cache"
    assert folder_digest(one, cache) == folder_digest(two, tmp_path / "other cache")
    write_folder(tmp_path / "two", tensors={"model.norm.weight": np.zeros(64, dtype=np.float32)})
    assert folder_digest(one, cache) != folder_digest(two, cache)
    before = folder_digest(one, cache)
    (one.path / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert folder_digest(one, cache) != before


def test_a_digest_is_paid_once_for_an_unchanged_file(tmp_path: Path) -> None:
    path, cache = tmp_path / "file", tmp_path / "cache"
    path.write_bytes(b"one")
    first = file_digest(path, cache)
    kept = next((cache / "digests").iterdir())
    kept.write_text(kept.read_text(encoding="utf-8").replace(first, "kept"), encoding="utf-8")
    assert file_digest(path, cache) == "kept"
    path.write_bytes(b"two!")
    assert file_digest(path, cache) not in ("kept", first)
    kept.write_text("{", encoding="utf-8")
    path.write_bytes(b"one")
    assert file_digest(path, cache) == first


def test_what_a_killed_process_left_is_removed_and_a_failed_one_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "model"
    left_over = tmp_path / ".model.1.partial"
    left_over.mkdir()
    publish_folder(target, lambda folder: (folder / "file").touch())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "model"]

    def fail(folder: Path) -> None:
        raise ModelError("no")

    with pytest.raises(ModelError):
        publish_folder(tmp_path / "other", fail)
    assert not list(tmp_path.glob(".other*"))


def test_the_card_ends_generation_wherever_the_model_ends_a_turn(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}), encoding="utf-8")
    text = {"chat_template": "{{ messages }}x", "bos_token": {"content": "A"}, "eos_token": "B"}
    (folder / "tokenizer_config.json").write_text(json.dumps(text), encoding="utf-8")
    model = open_folder(folder, name="m", dummy=False)
    card = model_card(model, cache_dir=tmp_path / "cache", served_name="mine", max_model_len=100, dtype="float32", created=5)
    assert card.eos_token_ids == (3, 4, ord("B"))
    assert card.special_tokens == {"bos_token": "A", "eos_token": "B"}
    assert (card.model.name, card.max_model_len, card.chat_template) == ("mine", 100, "{{ messages }}x")
    (folder / "chat_template.jinja").write_text("{{ other }}", encoding="utf-8")
    assert model_card(model, cache_dir=tmp_path / "cache").chat_template == "{{ other }}"
    with pytest.raises(ModelError, match="512"):
        model_card(model, cache_dir=tmp_path / "cache", max_model_len=513)


def test_cache_folder_by_environment() -> None:
    assert default_cache_dir({"SEGUE_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert default_cache_dir({"XDG_CACHE_HOME": "/b"}) == Path("/b/segue")
    assert default_cache_dir({}) == Path.home() / ".cache" / "segue"


def test_names_of_gguf_files_lose_their_quantisation() -> None:
    names = {
        "a.Q4_K_M.gguf": "a",
        "Llama-3.2-1B-IQ3_XS.gguf": "Llama-3.2-1B",
        "b-f16.gguf": "b",
        "Q8_0.gguf": "Q8_0",
        "c-7b.gguf": "c-7b",
    }
    assert {name: gguf_name(Path(name)) for name in names} == names


@pytest.mark.model
def test_the_bundled_model_is_found() -> None:
    assert bundled_file().suffix == ".gguf"
