"""What a step costs at least: operations and bytes of a model's step, and the time that a machine's limits leave for them.

Counted from the configuration, for dense decoders with a gated feed-forward (Llama, Mistral, Qwen2/3, SmolLM and their like):

    a layer's linears   P = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * intermediate        (elements)
    linear FLOPs        2 * tokens * layers * P + 2 * kept * hidden * vocabulary      kept: positions whose logits are asked for
    attention FLOPs     4 * layers * heads * head_dim * sum of the positions that each token sees (itself included)
    weight elements     layers * (P + 2 * hidden) + hidden + hidden * vocabulary      each read once a step, norms included
    weight bytes        elements * item bytes; of quantised matrices the bytes of their blocks, scales included
    KV bytes            2 * layers * kv_heads * head_dim * item bytes * sum of the contexts

    prefill limit       (linear FLOPs + causal attention FLOPs) / peak
    decode limit        max(linear FLOPs / peak, weight bytes / bandwidth) + KV bytes / bandwidth

The operations of a decode step's attention are left out of its limit, because they can hide behind the reading of the KV. Not
counted, being thousandths: biases, norms over heads, rotary embeddings, the rows of the embedding table. A sliding window is
not known here: such a model may come out above its limit in long contexts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.engine.model_config import ModelConfig
from common.values.errors import ModelError

_NOT_GATED = ("gpt2", "gpt_neox", "opt", "phi", "starcoder2", "gptj", "bloom", "falcon", "mpt")


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineLimits:
    """Of the cores that a step may use. `flop_per_s` is the peak for the weights' dtype."""

    read_bytes_per_s: float
    flop_per_s: float


def check_counted(config: ModelConfig) -> None:
    """Raises ModelError for a model whose step these formulas do not describe."""
    if config.experts > 1 or config.model_type in _NOT_GATED:
        raise ModelError(f"{config.architecture}: limits are known for dense decoders with a gated feed-forward only")


def layer_elements(config: ModelConfig) -> int:
    """Elements of one layer's linears."""
    attention = config.hidden_size * config.head_dim * 2 * (config.heads + config.kv_heads)
    return attention + 3 * config.hidden_size * config.intermediate_size


def weight_elements(config: ModelConfig) -> int:
    """Elements that every step reads: all layers with their norms, the last norm, and the table of output embeddings."""
    layers = config.layers * (layer_elements(config) + 2 * config.hidden_size)
    return layers + config.hidden_size + config.hidden_size * config.vocab_size


def float_weight_bytes(config: ModelConfig, *, item_bytes: int) -> float:
    """What every step reads of weights that all have one type."""
    return float(weight_elements(config) * item_bytes)


def quantized_weight_bytes(config: ModelConfig, matrices: Iterable[tuple[int, int]]) -> float:
    """The same where some matrices are kept in blocks and the rest in float32: `(elements, stored bytes)` of each such matrix
    that a step reads, scales and minima included."""
    return float_weight_bytes(config, item_bytes=4) - sum(4 * elements - stored for elements, stored in matrices)


def linear_flops(config: ModelConfig, *, tokens: int, kept: int) -> int:
    return 2 * tokens * config.layers * layer_elements(config) + 2 * kept * config.hidden_size * config.vocab_size


def attention_flops(config: ModelConfig, *, seen: int) -> int:
    """`seen` is the number of (query, key) pairs in one head of one layer: queries and keys, then weights and values."""
    return 4 * config.layers * config.heads * config.head_dim * seen


def causal_pairs(*, start: int, count: int) -> int:
    """What the positions `start .. start + count - 1` see, themselves included."""
    return count * start + count * (count + 1) // 2


def kv_bytes(config: ModelConfig, contexts: Sequence[int], *, item_bytes: int) -> int:
    return 2 * config.layers * config.kv_heads * config.head_dim * item_bytes * sum(contexts)


def prefill_limit_s(config: ModelConfig, machine: MachineLimits, *, tokens: int) -> float:
    """One prompt from its beginning, one token drawn at its end."""
    flops = linear_flops(config, tokens=tokens, kept=1) + attention_flops(config, seen=causal_pairs(start=0, count=tokens))
    return flops / machine.flop_per_s


def decode_limit_s(
    config: ModelConfig, machine: MachineLimits, contexts: Sequence[int], *, weight_bytes: float, kv_item_bytes: int
) -> float:
    """One step of a row for each of `contexts`, which count the position that is computed. `weight_bytes` are read once: see
    `float_weight_bytes` and `quantized_weight_bytes`."""
    rows = len(contexts)
    compute_s = linear_flops(config, tokens=rows, kept=rows) / machine.flop_per_s
    weights_s = weight_bytes / machine.read_bytes_per_s
    return max(compute_s, weights_s) + kv_bytes(config, contexts, item_bytes=kv_item_bytes) / machine.read_bytes_per_s
