"""Which forward a loaded model gets: the Llama family's on native kernels where there are any, else transformers' modules."""

import logging
from collections.abc import Mapping

import torch

from common.engine.forward import ModelForward, TransformersForward
from common.engine.native.library import NativeLibrary
from common.engine.native.linear_modules import ModuleKernels
from common.engine.native.llama_model import LlamaModel, misfit
from common.engine.native.native_forward import NativeForward
from common.engine.paged_attention import PAGED_ATTENTION, register_paged_attention
from common.engine.quantization_choice import Quantization, rounds
from common.engine.quantized_file import StoredMatrix
from common.engine.quantized_weights import MatrixSources, rounded_weights, stored_weights
from common.engine.self_check import checked_takeover, self_check
from common.values.kv_layout import KvLayout

logger = logging.getLogger(__name__)


def choose_forward(
    model: torch.nn.Module,
    layout: KvLayout,
    *,
    device: str,
    check: bool,
    max_model_len: int | None,
    library: NativeLibrary | None,
    quantization: Quantization = "none",
    stored: Mapping[str, StoredMatrix] | None = None,
) -> ModelForward:
    """With `check`, its logits are compared with those of the model's own attention first: ModelError where they differ.

    A model of the Llama family is used up: its weights are in the kernels' own memory afterwards. `stored` are the matrices
    that its folder keeps quantised. Without kernels, weights are rounded as `quantization` says, but kept expanded.
    """
    model.eval()
    if library is not None:
        reason = misfit(model) if model_dtype_fits(model, layout) else "the cache has another dtype"
        if reason is None:
            return _native(model, layout, library, _sources(model, layout, quantization, stored or {}, check=check), check=check)
        logger.info("the model runs in transformers' modules", extra={"reason": reason})
    if rounds(quantization):
        logger.warning("quantised weights are kept expanded: they need our own kernels", extra={"quantization": quantization})
        rounded_weights(model, quantization, expand=True)
    register_paged_attention()
    if check:
        self_check(model, layout, device=device, max_model_len=max_model_len)
    if library is None or device != "cpu":
        model.set_attn_implementation(PAGED_ATTENTION)  # type: ignore[operator]
        return TransformersForward(model)
    return _with_kernels(model, layout, library, check=check)


def model_dtype_fits(model: torch.nn.Module, layout: KvLayout) -> bool:
    """The kernels keep keys and values in float32 or bfloat16, of the same kind as the weights."""
    return layout.dtype in ("float32", "bfloat16") and str(next(model.parameters()).dtype) == f"torch.{layout.dtype}"


def _sources(
    model: torch.nn.Module, layout: KvLayout, quantization: Quantization, stored: Mapping[str, StoredMatrix], *, check: bool
) -> MatrixSources:
    """Stored blocks serve in float32 alone: in bfloat16 their expansion would be rounded, and they mean other numbers."""
    if rounds(quantization):
        return rounded_weights(model, quantization, expand=check)
    return stored_weights(model, stored) if quantization == "auto" and layout.dtype == "float32" else {}


def _with_kernels(model: torch.nn.Module, layout: KvLayout, library: NativeLibrary, *, check: bool) -> ModelForward:
    """transformers' modules, their linears and their attention ours.

    The architecture has passed its self-check in torch. The kernels in it are compared once more in float32 only: in bfloat16
    the last bits can choose other experts, which moves logits as far as a mistake would.
    """

    def take_over() -> TransformersForward:
        kernels = ModuleKernels(library)
        kernels.replace_linears(model)
        model.set_attn_implementation(PAGED_ATTENTION)  # type: ignore[operator]
        return TransformersForward(model, kernels)

    return checked_takeover(model, layout, take_over) if check and layout.dtype == "float32" else take_over()


def _native(model: torch.nn.Module, layout: KvLayout, library: NativeLibrary, sources: MatrixSources, *, check: bool) -> NativeForward:
    def take_over() -> NativeForward:
        return NativeForward(library, LlamaModel(library, model, consume=True, quantized=sources))

    if not check:
        return take_over()
    forward = checked_takeover(model, layout, take_over)
    assert isinstance(forward, NativeForward)
    return forward
