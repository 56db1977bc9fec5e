"""What `--quantization` means for a model's matrices, and what its weights then take. Loads no torch.

`auto` uses the blocks of a model that came quantised, where our kernels compute it in float32: its results are those of the
expanded weights, to the bit. `int8` and `int4` round the weights of any model when it is loaded, in groups of 32.
"""

from collections.abc import Mapping
from typing import Literal

from common.engine.memory_plan import WeightDemand, weight_demand
from common.engine.model_config import ModelConfig
from common.engine.model_files import ModelFolder
from common.engine.native.llama_family import FAMILY
from common.engine.quantized_matrix import BlockKind, can_be_quantized
from common.engine.safetensors_file import TensorHeader
from common.values.kv_layout import KvDtype

Quantization = Literal["auto", "none", "int8", "int4"]
_FLOAT_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
_ENDS = ("embed", "lm_head")


def rounds(quantization: Quantization) -> bool:
    """Whether the weights served are others than those of the model's files."""
    return quantization in ("int8", "int4")


def weights_name(revision: str, quantization: Quantization) -> str:
    """What a fingerprint carries: equal where the weights mean the same numbers."""
    return f"{revision}+{quantization}" if rounds(quantization) else revision


def kind_for(quantization: Quantization, *, end: bool) -> BlockKind:
    """The embeddings and the head (`end`) keep eight bits in `int4` too: every token passes through few of their numbers."""
    return BlockKind.Q4_1 if quantization == "int4" and not end else BlockKind.Q8_0


def quantized_demand(
    folder: ModelFolder, config: ModelConfig, dtype: KvDtype, quantization: Quantization, *, device: str, native: bool
) -> WeightDemand:
    """The weights of one worker. `native`: our kernels run here, and have the weights of their family in memory of their own."""
    headers = folder.tensor_headers()
    taken_over = native and config.architecture in FAMILY
    plain = weight_demand(config, headers, dtype, mapped=device == "cpu" and not taken_over and not rounds(quantization))
    if not taken_over or not headers:
        return plain
    if quantization == "auto" and dtype == "float32":
        sizes = {name: matrix.stored_bytes for name, matrix in folder.quantized().items()}
    elif rounds(quantization):
        sizes = {header.name: _rounded_bytes(header, quantization) for header in headers if can_be_quantized(header.shape)}
    else:
        return plain
    kept = sum(header.elements for header in headers if header.name not in sizes)
    return WeightDemand(weight_bytes=sum(sizes.values()) + kept * _FLOAT_BYTES[dtype], shared=False)


def _rounded_bytes(header: TensorHeader, quantization: Quantization) -> int:
    kind = kind_for(quantization, end=any(part in header.name for part in _ENDS))
    return header.shape[0] * kind.row_bytes(header.shape[1])
