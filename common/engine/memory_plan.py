"""Decides how much memory a worker's KV cache gets, how long a context and how many sequences, before anything is loaded.

Pure arithmetic on numbers of bytes: what does not fit is refused here, with the whole sum, and not by the kernel's
out-of-memory killer minutes later. On one host the plan is made once, for all workers, by whoever starts them: a worker that
planned for itself would see its neighbours' memory half taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from common.engine.model_config import ModelConfig
from common.engine.safetensors_file import TensorHeader
from common.values.errors import ModelError
from common.values.kv_layout import KvDtype, KvLayout

GIB = 2**30
RUNTIME_BYTES = 448 * 2**20
"""A worker's process before it has a model: interpreter, torch and transformers (326 MiB resident, measured), and slack."""
_DEFAULT_KV_BYTES = 2 * GIB
_DEFAULT_SEQUENCES = 32
_TYPICAL_SEQUENCE_TOKENS = 256
_LEAST_CONTEXT = 256
_KEEP_FREE = 0.1
_STORED_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightDemand:
    """Bytes of the weights in the served dtype. `shared`: they stay mapped from the file, so a host holds them once."""

    weight_bytes: int
    shared: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRequest:
    """What the user asked for; None means: compute it."""

    max_model_len: int | None = None
    max_num_seqs: int | None = None
    kv_cache_bytes: int | None = None
    max_num_batched_tokens: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """`kv_bytes` is the size of the region of one worker; bytes other than `available_bytes` are per worker too."""

    workers: int
    available_bytes: int
    weights: WeightDemand
    overhead_bytes: int
    kv_bytes: int
    blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int

    @property
    def total_bytes(self) -> int:
        return _fixed_bytes(self.weights, self.overhead_bytes, self.workers) + self.workers * self.kv_bytes

    def describe(self) -> str:
        """One line for the user."""
        tokens = self.blocks * self.block_size
        return (
            f"{self.workers} worker(s): {_sum_text(self.weights, self.overhead_bytes, self.kv_bytes, self.workers)} "
            f"of {_gib(self.available_bytes)} available; KV cache of {self.blocks} blocks ({tokens} tokens) a worker, "
            f"--max-model-len {self.max_model_len}, --max-num-seqs {self.max_num_seqs}"
        )


def kv_layout(config: ModelConfig, dtype: KvDtype, block_size: int) -> KvLayout:
    return KvLayout(layers=config.layers, kv_heads=config.kv_heads, head_dim=config.head_dim, block_size=block_size, dtype=dtype)


def weight_demand(config: ModelConfig, headers: Sequence[TensorHeader], dtype: KvDtype, *, mapped: bool) -> WeightDemand:
    """From the files' headers, or, for random weights (no headers), from the configuration's sizes.

    `mapped`: whether the loader leaves weights of the served dtype in the file's pages (it does, on a CPU).
    """
    if not headers:
        return WeightDemand(weight_bytes=parameter_count(config) * _DTYPE_BYTES[dtype], shared=False)
    elements = sum(header.elements for header in headers)
    same = all(header.dtype == _STORED_DTYPES[dtype] for header in headers)
    return WeightDemand(weight_bytes=elements * _DTYPE_BYTES[dtype], shared=mapped and same)


def parameter_count(config: ModelConfig) -> int:
    """Of a gated decoder with these sizes; exact for Llama's family up to norms and biases."""
    attention = config.hidden_size * config.head_dim * 2 * (config.heads + config.kv_heads)
    feed_forward = 3 * config.hidden_size * config.intermediate_size * config.experts
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tied_embeddings else 2)
    return embeddings + config.layers * (attention + feed_forward + 2 * config.hidden_size)


def overhead_bytes(config: ModelConfig, *, max_num_batched_tokens: int, max_num_seqs: int) -> int:
    """Process and activations: a step's hidden states, its widest layer, and a few float32 copies of the sampled rows' logits."""
    wide = 6 * config.hidden_size + 3 * config.intermediate_size + 4 * config.heads * config.head_dim
    logits = 4 * 4 * max_num_seqs * config.vocab_size
    return RUNTIME_BYTES + 4 * max_num_batched_tokens * wide + logits


def plan_memory(
    config: ModelConfig,
    layout: KvLayout,
    weights: WeightDemand,
    request: MemoryRequest,
    *,
    available_bytes: int,
    workers: int,
    shared_memory_bytes: int | None = None,
) -> MemoryPlan:
    """Raises ModelError, with the sum, for what cannot fit on a host with `workers` workers of this model.

    `shared_memory_bytes` bounds the KV regions of all workers where they lie in shared memory. A context that the user did not
    ask for is shortened to what the KV cache can hold; one that was asked for is kept or refused.
    """
    wanted_len = request.max_model_len or config.max_positions
    if wanted_len > config.max_positions:
        raise ModelError(f"--max-model-len {wanted_len} is more than the {config.max_positions} tokens that this model takes")
    sequences = request.max_num_seqs or _DEFAULT_SEQUENCES
    overhead = overhead_bytes(config, max_num_batched_tokens=request.max_num_batched_tokens, max_num_seqs=sequences)
    room = _kv_room(weights, overhead, available_bytes, shared_memory_bytes, workers)
    least_len = wanted_len if request.max_model_len is not None else min(wanted_len, _LEAST_CONTEXT)
    least = layout.region_bytes(layout.blocks_for(least_len))
    kv_bytes = request.kv_cache_bytes if request.kv_cache_bytes is not None else _default_kv_bytes(layout, wanted_len, sequences, room)
    if kv_bytes < least and request.kv_cache_bytes is not None:
        raise ModelError(
            f"--kv-cache-memory {_gib(kv_bytes)} cannot hold one sequence of {least_len} tokens, which takes {_gib(least)}"
        )
    kv_bytes = max(kv_bytes, least)
    if kv_bytes > room:
        raise _does_not_fit(weights, overhead, kv_bytes, available_bytes, shared_memory_bytes, workers)
    blocks = blocks_in(layout, kv_bytes)
    positions = blocks * layout.block_size
    return MemoryPlan(
        workers=workers,
        available_bytes=available_bytes,
        weights=weights,
        overhead_bytes=overhead,
        kv_bytes=layout.region_bytes(blocks),
        blocks=blocks,
        block_size=layout.block_size,
        max_model_len=min(wanted_len, positions),
        max_num_seqs=request.max_num_seqs or max(1, min(sequences, positions // _TYPICAL_SEQUENCE_TOKENS)),
    )


def blocks_in(layout: KvLayout, region_bytes: int) -> int:
    """The most blocks whose region is no larger than `region_bytes`."""
    blocks = max(0, region_bytes) // (layout.block_bytes + 8)
    while blocks > 0 and layout.region_bytes(blocks) > region_bytes:
        blocks -= 1
    return blocks


def _kv_room(weights: WeightDemand, overhead: int, available: int, shared_memory: int | None, workers: int) -> int:
    """The largest KV region that each of the workers can have; may be negative."""
    room = (available - _fixed_bytes(weights, overhead, workers)) // workers
    return room if shared_memory is None else min(room, shared_memory // workers)


def _default_kv_bytes(layout: KvLayout, max_model_len: int, sequences: int, room: int) -> int:
    """Every sequence at full length if that is little, else 2 GiB or one whole context, leaving a tenth of the room alone."""
    one = layout.region_bytes(layout.blocks_for(max_model_len))
    return max(0, min(int(room * (1 - _KEEP_FREE)), one * sequences, max(_DEFAULT_KV_BYTES, one)))


def _fixed_bytes(weights: WeightDemand, overhead: int, workers: int) -> int:
    return weights.weight_bytes * (1 if weights.shared else workers) + overhead * workers


def _does_not_fit(
    weights: WeightDemand, overhead: int, kv_bytes: int, available: int, shared_memory: int | None, workers: int
) -> ModelError:
    total = _fixed_bytes(weights, overhead, workers) + workers * kv_bytes
    if total <= available and shared_memory is not None:
        return ModelError(
            f"the KV cache does not fit into shared memory: {workers} x {_gib(kv_bytes)} = {_gib(workers * kv_bytes)} are needed, "
            f"/dev/shm has {_gib(shared_memory)} free. Enlarge it (shm_size in compose), or lower --kv-cache-memory or --max-model-len"
        )
    return ModelError(
        f"the model does not fit: {_sum_text(weights, overhead, kv_bytes, workers)} are needed, {_gib(available)} are available. "
        "Lower --kv-cache-memory or --max-model-len, start fewer workers, or take a smaller model or --dtype bfloat16"
    )


def _sum_text(weights: WeightDemand, overhead: int, kv_bytes: int, workers: int) -> str:
    total = _fixed_bytes(weights, overhead, workers) + workers * kv_bytes
    times = f"{workers} x " if workers > 1 else ""
    parts = (
        f"weights {'' if weights.shared else times}{_gib(weights.weight_bytes)}",
        f"KV cache {times}{_gib(kv_bytes)}",
        f"overhead {times}{_gib(overhead)}",
    )
    return f"{' + '.join(parts)} = {_gib(total)}"


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"
