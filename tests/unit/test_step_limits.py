"""The formulas of a step's least cost, against counting on tiny models: torch's own counter, every parameter, every pair."""

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from common.engine.model_config import ModelConfig
from common.engine.step_limits import (
    MachineLimits,
    attention_flops,
    causal_pairs,
    check_counted,
    decode_limit_s,
    float_weight_bytes,
    kv_bytes,
    linear_flops,
    prefill_limit_s,
    weight_elements,
)
from common.values.errors import ModelError
from common.values.kv_layout import KvLayout

SHAPES = [
    {"hidden": 64, "intermediate": 96, "layers": 3, "heads": 4, "kv_heads": 2, "vocabulary": 300, "tied": True},
    {"hidden": 48, "intermediate": 80, "layers": 1, "heads": 6, "kv_heads": 6, "vocabulary": 130, "tied": False},
]


def both(shape: dict[str, int]) -> tuple[ModelConfig, torch.nn.Module]:
    theirs = transformers.LlamaConfig(
        vocab_size=shape["vocabulary"], hidden_size=shape["hidden"], intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"],
        tie_word_embeddings=bool(shape["tied"]), max_position_embeddings=256,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(theirs, attn_implementation="eager").eval()  # type: ignore[no-untyped-call]
    ours = ModelConfig(
        architecture="LlamaForCausalLM", model_type="llama", layers=shape["layers"], hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"], heads=shape["heads"], kv_heads=shape["kv_heads"],
        head_dim=shape["hidden"] // shape["heads"], vocab_size=shape["vocabulary"], max_positions=256,
        tied_embeddings=bool(shape["tied"]),
    )  # fmt: skip
    return ours, model


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_all_that_a_step_reads(shape: dict[str, int]) -> None:
    config, model = both(shape)
    names = dict(model.named_parameters())
    table = names.pop("model.embed_tokens.weight") if not shape["tied"] else torch.empty(0)  # looked up, not read through
    assert table.numel() == (0 if shape["tied"] else config.vocab_size * config.hidden_size)
    assert weight_elements(config) == sum(parameter.numel() for parameter in names.values())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("tokens", "kept"), [(1, 1), (17, 1), (17, 17)])
def test_operations_are_those_that_torch_counts(shape: dict[str, int], tokens: int, kept: int) -> None:
    """Eager attention multiplies every query with every key; the limit counts only those that a query may see."""
    config, model = both(shape)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.arange(tokens)[None], use_cache=False, logits_to_keep=kept)
    counted = counter.get_total_flops()
    assert counted == linear_flops(config, tokens=tokens, kept=kept) + attention_flops(config, seen=tokens * tokens)


def test_a_position_sees_itself_and_all_before() -> None:
    for start in range(4):
        for count in range(1, 6):
            seen = sum(1 for query in range(start, start + count) for key in range(start + count) if key <= query)
            assert causal_pairs(start=start, count=count) == seen


def test_kv_bytes_are_those_of_the_region() -> None:
    config, _ = both(SHAPES[0])
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        layout = KvLayout(layers=3, kv_heads=2, head_dim=16, block_size=1, dtype=dtype)  # type: ignore[arg-type]
        assert kv_bytes(config, [5, 7], item_bytes=size) == 12 * layout.block_bytes


def test_a_prefill_is_bound_by_operations() -> None:
    config, _ = both(SHAPES[0])
    machine = MachineLimits(read_bytes_per_s=1.0, flop_per_s=1e9)
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    by_hand = 2 * 8 * 3 * layer + 2 * 64 * 300 + 4 * 3 * 4 * 16 * (1 + 2 + 3 + 4 + 5 + 6 + 7 + 8)
    assert prefill_limit_s(config, machine, tokens=8) == pytest.approx(by_hand / 1e9)


def test_a_decode_is_bound_by_weights_or_by_operations_and_always_by_its_kv() -> None:
    config, _ = both(SHAPES[0])
    kv_s = kv_bytes(config, [10, 20], item_bytes=4) / 100.0
    slow_memory = MachineLimits(read_bytes_per_s=100.0, flop_per_s=1e18)
    weights_s = weight_elements(config) * 4 / 100.0
    assert decode_limit_s(
        config, slow_memory, [10, 20], weight_bytes=float_weight_bytes(config, item_bytes=4), kv_item_bytes=4
    ) == pytest.approx(weights_s + kv_s)
    slow_cores = MachineLimits(read_bytes_per_s=100.0, flop_per_s=1.0)
    compute_s = float(linear_flops(config, tokens=2, kept=2))
    assert decode_limit_s(
        config, slow_cores, [10, 20], weight_bytes=float_weight_bytes(config, item_bytes=4), kv_item_bytes=4
    ) == pytest.approx(compute_s + kv_s)
    halved = decode_limit_s(config, slow_memory, [10, 20], weight_bytes=float_weight_bytes(config, item_bytes=2), kv_item_bytes=4)
    assert halved == pytest.approx(weights_s / 2 + kv_s)


def test_models_of_another_shape_are_refused() -> None:
    config, _ = both(SHAPES[0])
    check_counted(config)
    changed = {name: getattr(config, name) for name in config.__dataclass_fields__}
    with pytest.raises(ModelError, match="limits are known"):
        check_counted(ModelConfig(**{**changed, "model_type": "gpt2"}))
    with pytest.raises(ModelError, match="limits are known"):
        check_counted(ModelConfig(**{**changed, "experts": 8}))
