"""The quantised matrices of a loaded model: those its folder keeps, or those made of its weights by rounding."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from common.engine.quantization_choice import Quantization, kind_for
from common.engine.quantized_file import StoredMatrix
from common.engine.quantized_matrix import BlockKind, QuantizedMatrix, can_be_quantized, quantized
from common.values.errors import ModelError


class MatrixSource(Protocol):
    """Gives one matrix when it is needed, so that not all of them lie in memory at once."""

    def read(self) -> QuantizedMatrix: ...


MatrixSources = Mapping[str, MatrixSource]
"""By the name of the parameter."""


@dataclass(frozen=True, slots=True)
class _Held:
    matrix: QuantizedMatrix

    def read(self) -> QuantizedMatrix:
        return self.matrix


@dataclass(frozen=True, slots=True)
class _Rounded:
    weight: torch.nn.Parameter
    kind: BlockKind

    def read(self) -> QuantizedMatrix:
        return quantized(self.weight.detach().float().cpu().numpy(), self.kind)


def stored_weights(model: torch.nn.Module, stored: Mapping[str, StoredMatrix]) -> MatrixSources:
    """Those of the model's folder. Raises ModelError where they do not belong to the model's weights: each one's first and
    last row are compared, which reads little."""
    parameters = dict(model.named_parameters())
    for name, matrix in stored.items():
        weight = parameters.get(name)
        if weight is None or tuple(weight.shape) != matrix.shape:
            raise ModelError(f"{matrix.path} does not belong to this model: {name} of {matrix.shape}. Remove it, or convert again")
        for row in (0, matrix.shape[0] - 1):
            expanded = matrix.read_row(row).expanded()[0]
            if not np.array_equal(expanded, weight[row].detach().float().cpu().numpy()):
                raise ModelError(f"{matrix.path} does not belong to these weights: {name} differs. Remove it, or convert again")
    return stored


def rounded_weights(model: torch.nn.Module, quantization: Quantization, *, expand: bool) -> MatrixSources:
    """All matrices whose rows are whole blocks, rounded. With `expand`, the model's own weights become the expansion too, so
    that its modules compute with the same numbers; else they are rounded one by one, as they are read."""
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}  # type: ignore[operator]
    sources: dict[str, MatrixSource] = {}
    of_parameter: dict[int, MatrixSource] = {}  # tied modules have one
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, torch.nn.Linear | torch.nn.Embedding) or weight is None or not can_be_quantized(weight.shape):
            continue
        if id(weight) not in of_parameter:
            of_parameter[id(weight)] = _source(weight, kind_for(quantization, end=id(module) in ends), expand=expand)
        sources[f"{name}.weight"] = of_parameter[id(weight)]
    return sources


def _source(weight: torch.nn.Parameter, kind: BlockKind, *, expand: bool) -> MatrixSource:
    rounded = _Rounded(weight, kind)
    if not expand:
        return rounded
    matrix = rounded.read()
    weight.data = torch.from_numpy(matrix.expanded()).to(dtype=weight.dtype, device=weight.device)
    return _Held(matrix)
