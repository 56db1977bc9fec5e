"""Parts of `bench-engine` that are plain arithmetic on what was measured."""

from pathlib import Path

import pytest

from common.engine.model_config import ModelConfig
from common.engine.model_files import ModelFolder
from common.engine.quantized_file import QUANTIZED_FILE
from common.engine.step_limits import MachineLimits, decode_limit_s, float_weight_bytes, prefill_limit_s
from tools.bench_engine_machine import Machine
from tools.bench_engine_options import BenchOptions
from tools.bench_engine_peers import Missing, find_llama, find_vllm, without_blocks
from tools.bench_engine_ratios import four_bit_line, peer_table
from tools.bench_engine_report import make_report
from tools.bench_engine_rounds import Draw, Samples, Way
from tools.bench_engine_subject import Case, DecodeCase, PrefillCase, blocks_needed, first_length
from tools.bench_engine_table import as_text

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM", model_type="llama", layers=2, hidden_size=64, intermediate_size=96, heads=4, kv_heads=2,
    head_dim=16, vocab_size=300, max_positions=256,
)  # fmt: skip
MACHINE = Machine(cpu="a CPU", features=("avx2",), cores=(0,), load_average=0.0, busy_share=0.5)


class OnlyNamed:
    """A subject as the report sees it."""

    def __init__(self, weights: str, name: str = "engine") -> None:
        self.name, self.weights, self.kv_item_bytes = name, weights, 4
        self.visits: int | None = None

    def prefill_s(self, case: PrefillCase) -> list[float]:
        return [1.0]

    def decode_s(self, case: DecodeCase, *, steps: int) -> list[float]:
        return [1.0] * steps

    def close(self) -> None:
        pass


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8])
def test_the_measured_steps_see_the_context_in_the_mean(steps: int) -> None:
    first = first_length(DecodeCase(batch=1, context=256), steps=steps)
    seen = [first + step for step in range(1, steps + 1)]
    assert abs(sum(seen) / steps - 256) <= 0.5


def test_the_pool_holds_the_largest_case() -> None:
    cases: list[Case] = [PrefillCase(tokens=100), DecodeCase(batch=4, context=60)]
    assert blocks_needed(cases, steps=5, block_size=16) == 4 * 4
    assert blocks_needed(cases[:1], steps=5, block_size=16) == 7


def test_shares_are_limits_over_medians_with_the_best_peak_of_the_weights() -> None:
    samples = Samples(reads=[90.0, 100.0, 200.0], wall_s=2.0, cpu_s=1.0)
    samples.rates = {
        Way(name="a", dtype="float32"): [5.0],
        Way(name="b", dtype="float32"): [8.0],
        Way(name="b", dtype="bfloat16"): [6.0],
    }
    decode, prefill = DecodeCase(batch=2, context=10), PrefillCase(tokens=9)
    samples.times = {(0, prefill): [1e6, 3e6, 2e6], (0, decode): [1e6], (1, prefill): [1e6]}
    samples.draws = {Draw(rows=1, how="greedy"): [0.001, 0.003]}
    missing = [Missing(name="vLLM", reason="not installed")]
    weight_bytes = {"float32": float_weight_bytes(CONFIG, item_bytes=4), "bfloat16": float_weight_bytes(CONFIG, item_bytes=2)}
    report = make_report(
        samples,
        [OnlyNamed("float32"), OnlyNamed("bfloat16")],
        CONFIG,
        model="m",
        machine=MACHINE,
        clock="cpu",
        threads=1,
        rounds=3,
        weight_bytes=weight_bytes,
        missing=missing,
    )
    limits = MachineLimits(read_bytes_per_s=100.0, flop_per_s=8.0)
    figures = {(figure.weights, figure.kind): figure for figure in report.cases}
    assert figures["float32", "prefill"].share == pytest.approx(prefill_limit_s(CONFIG, limits, tokens=9) / 2e6)
    least_s = decode_limit_s(CONFIG, limits, [10, 10], weight_bytes=weight_bytes["float32"], kv_item_bytes=4)
    assert figures["float32", "decode"].share == pytest.approx(least_s / 1e6)
    assert figures["bfloat16", "prefill"].limit_s == figures["float32", "prefill"].limit_s, "widened to float32, which is quicker here"
    text = as_text(report)
    assert text.count("WARNING") == 2, "others used the core before, and while it measured"
    assert "vLLM: not installed" in text
    assert b'"share_of_limit"' in report.as_json()


SUBJECTS = (("float32", "segue, native"), ("int4", "segue, native"), ("float32", "vLLM"), ("int8", "segue, native"))


def test_ratios_are_to_the_same_weights_and_to_the_limit_of_float32() -> None:
    case = DecodeCase(batch=1, context=10)
    samples = Samples(reads=[100.0], wall_s=1.0, cpu_s=1.0)
    samples.rates = {Way(name="a", dtype="float32"): [1e3], Way(name="b", dtype="int8"): [1e6]}
    prefill = PrefillCase(tokens=8)
    samples.times = {(0, case): [400.0], (1, case): [100.0], (2, case): [600.0], (0, prefill): [1e6], (3, prefill): [1e6]}
    subjects = [OnlyNamed(weights, name) for weights, name in SUBJECTS]
    report = make_report(
        samples,
        subjects,
        CONFIG,
        model="m",
        machine=MACHINE,
        clock="wall",
        threads=1,
        rounds=1,
        weight_bytes={"float32": 20_000.0, "int4": 3_000.0, "int8": 6_000.0},
        missing=[],
    )
    limit_s = next(figure.limit_s for figure in report.cases if figure.kind == "decode" and figure.weights == "float32")
    assert limit_s is not None
    assert four_bit_line(report).endswith(f"int4 c10 {100.0 / limit_s:.2f}")
    assert peer_table(report, "decode").splitlines()[-1].replace(" ", "") == "|vLLM|float32|1.50|"
    assert peer_table(report, "prefill") == ""
    limits = {figure.weights: figure.limit_s for figure in report.cases if figure.kind == "prefill"}
    assert limits["int8"] == limits["float32"], "eight bits are kept, and multiplied as float32"


def test_vllm_is_given_the_weights_without_our_blocks(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_text("x", encoding="utf-8")
    folder = ModelFolder(path=tmp_path / "model", name="m", config_path=tmp_path / "model" / "config.json", weights=())
    assert without_blocks(folder, tmp_path / "links") == folder.path
    (tmp_path / "model" / QUANTIZED_FILE).write_text("x", encoding="utf-8")
    links = without_blocks(folder, tmp_path / "links")
    assert {path.name for path in links.iterdir()} == {"config.json", "model.safetensors"}
    assert (links / "model.safetensors").read_text(encoding="utf-8") == "x"


def test_wrong_flags_are_named() -> None:
    cores = frozenset({0, 1})
    assert BenchOptions().problem(cores) is None
    assert "--cores" in str(BenchOptions(cores=(5,)).problem(cores))
    assert "--weights" in str(BenchOptions(weights=("int3",)).problem(cores))
    assert "--forwards" in str(BenchOptions(forwards=("magic",)).problem(cores))
    assert "--threads" in str(BenchOptions(threads=0).problem(cores))
    assert "--batches" in str(BenchOptions(batches=(0,)).problem(cores))


def test_absent_peers_are_said_to_be_absent(tmp_path: Path) -> None:
    for found in (find_vllm(None), find_vllm(str(tmp_path / "python")), find_llama(str(tmp_path))):
        assert isinstance(found, Missing)
        assert "not installed" in found.reason
