"""How many bytes of weights a decode step reads, by the kind of weights: what `bench-engine` divides by the memory's bandwidth."""

from collections.abc import Iterable

from common.engine.model_config import ModelConfig
from common.engine.model_files import ModelFolder
from common.engine.quantization_choice import Quantization, kind_for
from common.engine.quantized_matrix import can_be_quantized
from common.engine.step_limits import float_weight_bytes, quantized_weight_bytes
from common.values.errors import ModelError

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_EMBEDDING = "embed_tokens.weight"


def step_weight_bytes(folder: ModelFolder, weights: str) -> float:
    """Raises ModelError for weights of which this is not known, such as the blocks of a model that has none."""
    config = folder.config()
    match weights:
        case "float32" | "bfloat16" | "float16":
            return float_weight_bytes(config, item_bytes=_ITEM_BYTES[weights])
        case "int8" | "int4":
            return quantized_weight_bytes(config, _rounded(config, weights))
        case "gguf" if stored := folder.quantized():
            read = [matrix for name, matrix in stored.items() if config.tied_embeddings or not name.endswith(_EMBEDDING)]
            return quantized_weight_bytes(config, [(matrix.shape[0] * matrix.shape[1], matrix.stored_bytes) for matrix in read])
        case _:
            raise ModelError(f"{folder.name} has no {weights} weights")


def _rounded(config: ModelConfig, quantization: Quantization) -> Iterable[tuple[int, int]]:
    """Every linear of the layers, and the head: as `--quantization` keeps them."""
    heads, kv_heads = config.heads * config.head_dim, config.kv_heads * config.head_dim
    hidden, intermediate = config.hidden_size, config.intermediate_size
    layer = ((heads + 2 * kv_heads, hidden), (hidden, heads), (2 * intermediate, hidden), (hidden, intermediate))
    for shape, count, end in (*((shape, config.layers, False) for shape in layer), ((config.vocab_size, hidden), 1, True)):
        if can_be_quantized(shape):
            stored = shape[0] * kind_for(quantization, end=end).row_bytes(shape[1])
            yield count * shape[0] * shape[1], count * stored
