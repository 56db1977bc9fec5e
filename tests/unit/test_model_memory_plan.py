"""The arithmetic of memory: what is planned fits, what does not fit is refused with the sum."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.engine.host_memory import available_memory_bytes
from common.engine.host_plan import plan_on_this_host
from common.engine.memory_plan import (
    GIB,
    MemoryPlan,
    MemoryRequest,
    WeightDemand,
    blocks_in,
    kv_layout,
    parameter_count,
    plan_memory,
    weight_demand,
)
from common.engine.model_config import ModelConfig
from common.engine.model_files import open_folder
from common.engine.safetensors_file import TensorHeader
from common.values.errors import ModelError
from tests.tiny_models import write_folder

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    model_type="llama",
    layers=30,
    hidden_size=576,
    intermediate_size=1536,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_positions=8192,
    tied_embeddings=True,
)
LAYOUT = kv_layout(CONFIG, "float32", 16)
WEIGHTS = WeightDemand(weight_bytes=538_060_032, shared=True)


def plan(request: MemoryRequest, *, available: int = 16 * GIB, workers: int = 1, shared_memory: int | None = None) -> MemoryPlan:
    return plan_memory(CONFIG, LAYOUT, WEIGHTS, request, available_bytes=available, workers=workers, shared_memory_bytes=shared_memory)


@given(
    available=st.integers(1, 64 * GIB),
    workers=st.integers(1, 9),
    shared_memory=st.none() | st.integers(0, 64 * GIB),
    max_model_len=st.none() | st.integers(1, 8192),
    kv_cache_bytes=st.none() | st.integers(0, 32 * GIB),
    max_num_seqs=st.none() | st.integers(1, 300),
)
def test_a_plan_fits_and_keeps_what_was_asked_for_or_is_refused(
    available: int,
    workers: int,
    shared_memory: int | None,
    max_model_len: int | None,
    kv_cache_bytes: int | None,
    max_num_seqs: int | None,
) -> None:
    request = MemoryRequest(max_model_len=max_model_len, max_num_seqs=max_num_seqs, kv_cache_bytes=kv_cache_bytes)
    try:
        made = plan(request, available=available, workers=workers, shared_memory=shared_memory)
    except ModelError:
        return
    assert made.total_bytes <= available
    assert shared_memory is None or workers * made.kv_bytes <= shared_memory
    assert made.max_model_len <= made.blocks * LAYOUT.block_size
    assert max_model_len in (None, made.max_model_len)
    assert max_num_seqs in (None, made.max_num_seqs)
    assert kv_cache_bytes is None or made.kv_bytes <= kv_cache_bytes
    assert made.max_num_seqs >= 1


def test_the_refusal_spells_out_the_sum() -> None:
    with pytest.raises(
        ModelError, match=r"weights 0\.50 GiB \+ KV cache 2 x 8\.00 GiB \+ overhead 2 x .* = .* 4\.00 GiB are available"
    ):
        plan(MemoryRequest(kv_cache_bytes=8 * GIB), available=4 * GIB, workers=2)


def test_a_small_shared_memory_is_named() -> None:
    with pytest.raises(ModelError, match="shm_size"):
        plan(MemoryRequest(max_model_len=8192), shared_memory=64 * 2**20)


def test_an_unasked_context_is_shortened_to_the_cache() -> None:
    made = plan(MemoryRequest(kv_cache_bytes=64 * 2**20))
    assert 256 <= made.max_model_len < CONFIG.max_positions


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(ModelError, match="8192"):
        plan(MemoryRequest(max_model_len=8193))


@given(st.integers(0, 4 * GIB))
def test_blocks_fill_a_region_to_the_brim(region_bytes: int) -> None:
    blocks = blocks_in(LAYOUT, region_bytes)
    assert blocks == 0 or LAYOUT.region_bytes(blocks) <= region_bytes
    assert LAYOUT.region_bytes(blocks + 1) > region_bytes


def test_the_estimate_for_random_weights_is_the_real_count_up_to_the_last_norm() -> None:
    assert parameter_count(CONFIG) + CONFIG.hidden_size == 134_515_008


def test_weights_are_shared_only_where_they_stay_mapped() -> None:
    headers = [TensorHeader(name="a", dtype="F32", shape=(10, 10))]
    assert weight_demand(CONFIG, headers, "float32", mapped=True) == WeightDemand(weight_bytes=400, shared=True)
    assert weight_demand(CONFIG, headers, "bfloat16", mapped=True) == WeightDemand(weight_bytes=200, shared=False)
    assert not weight_demand(CONFIG, headers, "float32", mapped=False).shared
    assert not weight_demand(CONFIG, [], "float32", mapped=True).shared


def written(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")


@pytest.mark.parametrize("line", ["0::/outer/inner", "4:memory:/outer/inner"])
def test_the_tightest_control_group_counts_and_its_reclaimable_cache_is_free(tmp_path: Path, line: str) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    written(proc / "meminfo", "MemTotal: 4000 kB\nMemAvailable: 3000 kB\n")
    written(proc / "self" / "cgroup", f"2:cpu:/\n{line}\n")
    assert available_memory_bytes(proc, groups) == 3000 * 1024
    second = line.startswith("0")
    outer = groups / "outer" if second else groups / "memory" / "outer"
    names = ("memory.max", "memory.current", "inactive_file") if second else (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    )  # fmt: skip
    written(outer / "inner" / names[0], "max\n" if second else "9223372036854771712\n")
    written(outer / names[0], "1000000\n")
    written(outer / names[1], "600000\n")
    written(outer / "memory.stat", f"anon 5\n{names[2]} 100000\n")
    assert available_memory_bytes(proc, groups) == 500_000


def test_this_host_can_plan_for_a_tiny_model(tmp_path: Path) -> None:
    folder = open_folder(write_folder(tmp_path / "m"), name="m", dummy=False)
    made = plan_on_this_host(folder, MemoryRequest(max_num_seqs=2, kv_cache_bytes=2**20), dtype="float32", workers=2)
    assert (made.workers, made.max_num_seqs) == (2, 2)
    assert made.weights.shared
    assert f"{made.blocks} blocks" in made.describe()
