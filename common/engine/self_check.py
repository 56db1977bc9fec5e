"""Does this architecture compute the same through paged attention as by itself? Asked at load, before a token is served.

transformers passes every attention call of a standard decoder through its attention interface, but not of all architectures:
some never call it, some add something of their own beside it. Those would answer fluently and wrongly, so they are refused.
Two short prompts run through the model's eager attention, then through ours in chunks beside each other, and all logits are compared.
"""

from collections.abc import Callable, Sequence

import torch

from common.engine.forward import ModelForward, forward
from common.engine.kv_cache_view import KvCacheView, torch_dtype
from common.engine.paged_attention import PAGED_ATTENTION, register_paged_attention
from common.engine.paged_batch import BatchRow, paged_batch
from common.values.errors import ModelError
from common.values.kv_layout import KvLayout

_LENGTHS = (37, 21)
_TOLERANCE = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 2e-1}
"""Largest difference allowed, in standard deviations of the reference logits."""
_TAKEOVER_TOLERANCE = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 6e-1}
"""The same for native kernels. In bfloat16 they round in fewer places than transformers does, which moves single logits; a wrong
layer moves them by several standard deviations."""


def self_check(model: torch.nn.Module, layout: KvLayout, *, device: str = "cpu", max_model_len: int | None = None) -> None:
    """Raises ModelError, naming the architecture and what differs. Leaves the model set to PAGED_ATTENTION.

    `max_model_len` is the longest sequence to be served, None where that is not known.
    """
    name = type(model).__name__
    check_rotary(model, max_model_len)
    register_paged_attention()
    prompts = _prompts(model)
    with torch.inference_mode():
        expected = _eager_logits(model, name, prompts, device)
        try:
            model.set_attn_implementation(PAGED_ATTENTION)  # type: ignore[operator]
            actual = _paged_logits(_Counted(model, layout), layout, prompts, device)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"{name} cannot run with paged attention: {type(error).__name__}: {error}") from error
    _compare(name, actual, expected, _TOLERANCE[layout.dtype])


def checked_takeover(model: torch.nn.Module, layout: KvLayout, take_over: Callable[[], ModelForward]) -> ModelForward:
    """The forward that `take_over` makes of the model, if its logits are those of the model before; else ModelError.

    `take_over` may use the model up.
    """
    name = type(model).__name__
    prompts = _prompts(model)
    with torch.inference_mode():
        expected = _eager_logits(model, name, prompts, "cpu")
        made = take_over()
        actual = _paged_logits(made, layout, prompts, "cpu")
    _compare(name, actual, expected, _TAKEOVER_TOLERANCE[layout.dtype])
    return made


class _Counted:
    """transformers' forward, checked to call paged attention once a layer."""

    def __init__(self, model: torch.nn.Module, layout: KvLayout) -> None:
        self._model = model
        self._layout = layout
        self.vocab_size = 0

    def prepare_thread(self, threads: int) -> None:
        """Nothing to prepare: the check runs with the threads that torch has."""

    def logits(self, cache: KvCacheView, rows: Sequence[BatchRow]) -> torch.Tensor:
        batch = paged_batch(cache, rows)
        logits = forward(self._model, batch)
        _check_called(type(self._model).__name__, self._layout, batch.called)
        return logits


def _prompts(model: torch.nn.Module) -> list[list[int]]:
    return [_prompt(model, length, seed) for seed, length in enumerate(_LENGTHS)]


def _prompt(model: torch.nn.Module, length: int, seed: int) -> list[int]:
    size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    return [(7919 * (place + 1) + 104729 * seed) % int(size) for place in range(length)]


def _eager_logits(model: torch.nn.Module, name: str, prompts: list[list[int]], device: str) -> list[torch.Tensor]:
    try:
        model.set_attn_implementation("eager")  # type: ignore[operator]
        return [model(input_ids=torch.tensor([prompt], device=device), use_cache=False).logits[0].float() for prompt in prompts]
    except Exception as error:
        raise ModelError(f"{name} cannot compute a short prompt: {type(error).__name__}: {error}") from error


def _paged_logits(made: ModelForward, layout: KvLayout, prompts: list[list[int]], device: str) -> list[torch.Tensor]:
    """Chunks, a whole prompt beside them, then single positions; the blocks of the two prompts lie mixed in the pool."""
    long, short = prompts
    each = layout.blocks_for(len(long))
    shape = (2 * each, layout.layers, 2, layout.kv_heads, layout.block_size, layout.head_dim)
    cache = KvCacheView(torch.zeros(shape, dtype=torch_dtype(layout), device=device), layout)
    odd, even = tuple(range(1, 2 * each, 2)), tuple(range(0, 2 * each, 2))
    parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for plan in (
        ((0, 0, 20), (1, 0, 19)),
        ((0, 20, 35), (1, 19, 20)),
        ((0, 35, 36), (1, 20, 21)),
        ((0, 36, 37),),
    ):
        rows = [
            BatchRow(tokens=(long, short)[which][start:end], start=start, blocks=(odd, even)[which], kept=range(end - start))
            for which, start, end in plan
        ]
        logits = made.logits(cache, rows)
        for (which, start, end), part in zip(plan, torch.split(logits, [len(row.tokens) for row in rows]), strict=True):
            assert len(part) == end - start
            parts[which].append(part)
    return [torch.cat(part) for part in parts]


def _compare(name: str, actual: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    difference = max(_difference(one, other) for one, other in zip(actual, expected, strict=True))
    if not difference <= tolerance:
        raise ModelError(
            f"{name} is not supported: its logits through paged attention differ from its own by {difference:.2g} standard deviations"
        )


def _check_called(name: str, layout: KvLayout, called: list[int]) -> None:
    if called != list(range(layout.layers)):
        raise ModelError(
            f"{name} is not supported: paged attention ran {len(called)} times in one pass of {layout.layers} layers "
            "(this architecture attends in another way)"
        )


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    spread = float(expected.std())
    if actual.shape != expected.shape or spread == 0.0:
        return float("inf")
    return float((actual - expected).abs().max()) / spread


def check_rotary(model: torch.nn.Module, max_model_len: int | None) -> None:
    """Rotary embeddings that look at the longest sequence of a batch make a token depend on its neighbours: ModelError."""
    name = type(model).__name__
    given = getattr(model.config, "rope_parameters", None) or {}
    by_layer_type = [part for part in given.values() if isinstance(part, dict)]
    for parameters in by_layer_type or [given]:
        kind = parameters.get("rope_type", "default")
        limit = parameters.get("original_max_position_embeddings", 0)
        if kind == "dynamic":
            raise ModelError(f"{name} with rope_type 'dynamic' is not supported: its tokens would depend on the batch")
        if kind == "longrope" and (max_model_len is None or max_model_len > limit):
            raise ModelError(f"{name} with rope_type 'longrope' is supported up to {limit} positions: set --max-model-len {limit}")
