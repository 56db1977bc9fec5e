"""How many bytes of weights a step reads: the formula against the matrices as the engine keeps them."""

from pathlib import Path

import numpy as np
import pytest

from common.engine.load_model import load_model
from common.engine.model_files import ModelFolder, open_config, open_folder
from common.engine.quantization_choice import Quantization
from common.engine.quantized_file import write_quantized_file
from common.engine.quantized_matrix import BlockKind, quantized
from common.engine.quantized_weights import rounded_weights
from common.engine.safetensors_file import TensorToWrite
from common.values.errors import ModelError
from tests.tiny_models import LLAMA_CONFIG, write_folder
from tools.step_weight_bytes import step_weight_bytes


def folder_of(path: Path, *, tied: bool) -> ModelFolder:
    written = write_folder(path, {**LLAMA_CONFIG, "tie_word_embeddings": tied})
    return open_config(written / "config.json", name="tiny")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_rounded_weights_are_counted_with_their_scales(tmp_path: Path, quantization: Quantization, *, tied: bool) -> None:
    folder = folder_of(tmp_path, tied=tied)
    model = load_model(folder, dtype="float32")
    sources = rounded_weights(model, quantization, expand=False)
    kept = {name: source.read().blocks.nbytes for name, source in sources.items() if name != "model.embed_tokens.weight"}
    if tied:
        kept["lm_head.weight"] = sources["model.embed_tokens.weight"].read().blocks.nbytes
    vectors = sum(parameter.numel() for name, parameter in model.named_parameters() if parameter.ndim == 1)
    assert step_weight_bytes(folder, quantization) == sum(kept.values()) + 4 * vectors


def test_blocks_of_a_file_are_counted_as_they_are_and_the_rest_in_float32(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, tied=True)
    plain = step_weight_bytes(folder, "float32")
    matrix = quantized(np.random.default_rng(1).standard_normal((64, 64), dtype=np.float32), BlockKind.Q4_1)
    name = "model.layers.0.self_attn.o_proj.weight"
    tensor = TensorToWrite(name=name, shape=matrix.blocks.shape, make=lambda: matrix.blocks, dtype="U8")
    write_quantized_file(tmp_path / "quantized.safetensors", [tensor], {name: BlockKind.Q4_1})
    with_blocks = open_folder(tmp_path, name="tiny", dummy=False)
    assert step_weight_bytes(with_blocks, "gguf") == plain - 4 * 64 * 64 + matrix.blocks.nbytes


def test_a_model_without_blocks_has_none_to_count(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no gguf weights"):
        step_weight_bytes(folder_of(tmp_path, tied=True), "gguf")
