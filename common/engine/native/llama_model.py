"""A loaded model of the Llama family, taken over by the kernels: its weights packed, its flags read off transformers' modules.

The family: grouped attention with rotary embedding, RMS norms before each half of a layer, a SiLU-gated feed-forward. Biases,
norms of queries and keys, sliding windows and layers without positions are flags of a layer.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from common.engine.native.library import LayerStruct, ModelStruct, NativeLibrary, PackedMatrix, WeightMemory
from common.engine.native.llama_family import FAMILY
from common.engine.native.rotary_table import RotaryTable
from common.engine.quantized_matrix import QuantizedMatrix, stacked
from common.engine.quantized_weights import MatrixSources
from common.values.errors import ModelError

_ROTARY_KINDS = frozenset({"default", "linear", "llama3", "yarn"})
"""Those whose angles depend on the position alone."""
_HEAD_DIM_STEP = 16


def misfit(model: torch.nn.Module) -> str | None:
    """Why these kernels cannot compute this model, or None where they can."""
    name = type(model).__name__
    if name not in FAMILY:
        return f"{name} is not of the Llama family"
    config: Any = model.config
    head_dim = _head_dim(model)
    rotary = getattr(config, "rope_parameters", None) or {}
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if config.hidden_act != "silu":
        return f"its gate is {config.hidden_act}"
    if rotary.get("rope_type", "default") not in _ROTARY_KINDS or float(rotary.get("partial_rotary_factor", 1.0)) != 1.0:
        return "its rotary embedding is of another kind"
    if head_dim % _HEAD_DIM_STEP or config.hidden_size % 2 or config.intermediate_size % 2:
        return f"heads of {head_dim} or layers of {config.hidden_size} and {config.intermediate_size} do not fit the kernels"
    if dtypes not in ({torch.float32}, {torch.bfloat16}):
        return f"its weights are {', '.join(sorted(str(dtype) for dtype in dtypes))}"
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return "it is not on the CPU"
    return None


class LlamaModel:
    """Packed weights and the structures that point at them. All that the structures point at lives as long as this object."""

    def __init__(
        self, library: NativeLibrary, model: torch.nn.Module, *, consume: bool, quantized: MatrixSources | None = None
    ) -> None:
        """`misfit(model)` must be None. With `consume`, each weight of `model` is dropped once it is packed, so that the
        two never lie in memory together; the model is of no use afterwards. Matrices that `quantized` has are taken from it;
        where the parts of one that the kernels join are of several kinds, it is taken from the model."""
        self._library = library
        self._quantized = quantized or {}
        self._names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
        self._consume = consume
        self._memory = _memory_for(library, model)
        self._kept: list[PackedMatrix | NDArray[np.float32]] = []
        config: Any = model.config
        inner: Any = model.model
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        self.logits_size = int(model.lm_head.weight.shape[0])  # type: ignore[union-attr,index]
        self.rotary = RotaryTable(cast("torch.nn.Module", inner.rotary_emb), _head_dim(model))
        scale = float(inner.layers[0].self_attn.scaling)
        final_norm = self._vector(inner.norm.weight)
        layers = [self._layer(layer) for layer in inner.layers]
        head, embedding = self._ends(model)
        self._layers = (LayerStruct * len(layers))(*layers)
        self.struct = ModelStruct(
            layers=len(layers),
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=_head_dim(model),
            intermediate=config.intermediate_size,
            epsilon=config.rms_norm_eps,
            scale=scale,
            layer=self._layers,
            final_norm=final_norm,
            head=head,
            embedding=embedding,
        )

    def _ends(self, model: torch.nn.Module) -> tuple[int, int]:
        """The head and the embeddings, which are one matrix where they are tied."""
        head, embeddings = model.lm_head, model.get_input_embeddings()  # type: ignore[operator]
        tied = head.weight.data_ptr() == embeddings.weight.data_ptr()  # type: ignore[union-attr,operator]
        packed = self._pack([embeddings if tied else cast("torch.nn.Module", head)])
        return packed, packed if tied else self._pack([embeddings])

    def _layer(self, layer: torch.nn.Module) -> LayerStruct:
        attention, feed_forward = layer.self_attn, layer.mlp
        window = getattr(attention, "sliding_window", None)
        if window is None and type(layer).__name__.startswith("Mistral"):
            window = getattr(attention.config, "sliding_window", None)  # type: ignore[union-attr]
        inputs = _modules(attention, ("q_proj", "k_proj", "v_proj"))
        wide = _modules(feed_forward, ("gate_proj", "up_proj"))
        return LayerStruct(
            qkv_bias=self._biases(inputs),
            output_bias=self._biases(_modules(attention, ("o_proj",))),
            gate_up_bias=self._biases(wide),
            down_bias=self._biases(_modules(feed_forward, ("down_proj",))),
            qkv=self._pack(inputs),
            output=self._pack(_modules(attention, ("o_proj",))),
            gate_up=self._pack(wide),
            down=self._pack(_modules(feed_forward, ("down_proj",))),
            input_norm=self._vector(layer.input_layernorm.weight),  # type: ignore[union-attr]
            middle_norm=self._vector(layer.post_attention_layernorm.weight),  # type: ignore[union-attr]
            query_norm=self._norm_of(attention, "q_norm"),
            key_norm=self._norm_of(attention, "k_norm"),
            window=window or 0,
            rotary=int(bool(getattr(attention, "use_rope", True))),
        )

    def _pack(self, modules: Sequence[torch.nn.Module]) -> int:
        """The modules' weights below each other, as one matrix."""
        parts = [cast("torch.Tensor", module.weight).detach() for module in modules]
        rows = sum(len(part) for part in parts)
        blocks = self._blocks(modules)
        if blocks is not None and blocks.shape != (rows, parts[0].shape[1]):
            raise ModelError(f"the quantised {self._names[id(modules[0])]} has the shape {blocks.shape}")
        weights = _array(parts[0] if len(parts) == 1 else torch.cat(parts)) if blocks is None else blocks
        packed = PackedMatrix(self._library, weights, self._memory)
        self._kept.append(packed)
        if self._consume:
            for module in modules:
                cast("torch.nn.Parameter", module.weight).data = parts[0].new_empty(0)
        return packed.address

    def _blocks(self, modules: Sequence[torch.nn.Module]) -> QuantizedMatrix | None:
        sources = [self._quantized[name] for module in modules if (name := self._names[id(module)]) in self._quantized]
        return stacked([source.read() for source in sources]) if len(sources) == len(modules) else None

    def _biases(self, modules: Sequence[torch.nn.Module]) -> int | None:
        """The modules' biases behind each other, zeros for one that has none; None where none has."""
        if all(getattr(module, "bias", None) is None for module in modules):
            return None
        sizes = [len(cast("torch.Tensor", module.weight)) for module in modules]
        parts = [torch.zeros(size) if module.bias is None else module.bias for module, size in zip(modules, sizes, strict=True)]
        return self._vector(torch.cat([cast("torch.Tensor", part).float() for part in parts]))

    def _norm_of(self, attention: object, name: str) -> int | None:
        norm = getattr(attention, name, None)
        return None if norm is None else self._vector(norm.weight)

    def _vector(self, tensor: object) -> int:
        assert isinstance(tensor, torch.Tensor)
        array = np.array(tensor.detach().float().numpy(), dtype=np.float32)
        self._kept.append(array)
        return array.ctypes.data


def _memory_for(library: NativeLibrary, model: torch.nn.Module) -> WeightMemory:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    return WeightMemory(library, [(len(matrix), matrix.shape[1]) for matrix in matrices], matrices[0].element_size())


def _array(weights: torch.Tensor) -> NDArray[np.float32] | NDArray[np.uint16]:
    rows = weights.contiguous()
    array = rows.view(torch.uint16).numpy() if rows.dtype == torch.bfloat16 else rows.numpy()
    return cast("NDArray[np.float32] | NDArray[np.uint16]", array)


def _modules(parent: object, names: Sequence[str]) -> list[torch.nn.Module]:
    return [cast("torch.nn.Module", getattr(parent, name)) for name in names]


def _head_dim(model: torch.nn.Module) -> int:
    config: Any = model.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
