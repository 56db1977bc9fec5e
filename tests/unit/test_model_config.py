"""What a configuration says, and which models are refused before anything is loaded."""

import json
from pathlib import Path

import pytest

from common.engine.model_config import read_config
from common.values.errors import ModelError
from tests.tiny_models import LLAMA_CONFIG


def written(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "config.json"
    content = {name: value for name, value in {**LLAMA_CONFIG, **changes}.items() if value is not None}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_missing_fields_take_the_meaning_that_transformers_gives_them(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, num_key_value_heads=None))
    assert (config.kv_heads, config.head_dim) == (4, 16)
    assert read_config(written(tmp_path, model_type="qwen3", head_dim=None)).head_dim == 128
    assert read_config(written(tmp_path, head_dim=32)).head_dim == 32


def test_names_of_older_configurations_are_read(tmp_path: Path) -> None:
    old = {
        "num_hidden_layers": None,
        "n_layer": 5,
        "hidden_size": None,
        "n_embd": 48,
        "max_position_embeddings": None,
        "n_positions": 77,
    }
    config = read_config(written(tmp_path, **old))
    assert (config.layers, config.hidden_size, config.max_positions) == (5, 48, 77)


def test_one_end_token_or_several(tmp_path: Path) -> None:
    assert read_config(written(tmp_path, eos_token_id=[3, 5])).eos_token_ids == (3, 5)
    assert read_config(written(tmp_path, eos_token_id=3)).eos_token_ids == (3,)
    assert read_config(written(tmp_path, eos_token_id=None)).eos_token_ids == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": None}, "model_type"),
        ({"is_encoder_decoder": True}, "decoder-only"),
        ({"vision_config": {}}, "decoder-only"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"kv_lora_rank": 512}, "standard attention"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers"),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_reason(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        read_config(written(tmp_path, **changes))


@pytest.mark.parametrize("content", ["", "[]", "{", '"text"', "\x00"])
def test_a_damaged_configuration_is_a_sentence(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(path)
