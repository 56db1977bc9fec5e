"""Which dtype `auto` takes: by rule where nothing is to be measured, by what was measured else."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.engine.auto_dtype import DtypeQuestion, auto_dtype
from common.engine.dtype_choice import WORTH, DtypeTrial, choose_by_trials
from common.engine.model_files import ModelFolder, open_config
from common.engine.native.cpu_variant import VARIANTS, CpuVariant
from common.engine.native.dtype_trial import Candidate, try_dtypes
from common.engine.native.library import NativeLibrary
from common.engine.quantized_matrix import BlockKind
from tests.native_kernels import best_library, library_of
from tests.tiny_models import LLAMA_CONFIG

seconds = st.floats(1e-6, 10.0)


def trial_of(dtype: str, prefill: float, single: float, rows: float) -> DtypeTrial:
    return DtypeTrial(dtype=dtype, weights=dtype, prefill_token_s=prefill, single_step_s=single, rows_step_s=rows)  # type: ignore[arg-type]


@given(st.tuples(seconds, seconds, seconds), st.tuples(seconds, seconds, seconds))
def test_bfloat16_is_taken_exactly_where_it_is_worth_it(exact: tuple[float, ...], narrow: tuple[float, ...]) -> None:
    trials = [trial_of("float32", *exact), trial_of("bfloat16", *narrow)]
    choice = choose_by_trials(trials)
    assert (choice.dtype == "bfloat16") == (trials[0].request_s >= WORTH * trials[1].request_s)
    assert choice.reason.index(choice.dtype) < min(choice.reason.index(trial.dtype) for trial in trials if trial.dtype != choice.dtype)


@given(st.tuples(seconds, seconds, seconds))
def test_what_is_quicker_at_everything_takes_less_time(times: tuple[float, ...]) -> None:
    assert trial_of("float32", *times).request_s > trial_of("float32", *(time / 2 for time in times)).request_s


def folder_of(path: Path, **changes: object) -> ModelFolder:
    config_path = path / "tiny.json"
    config_path.write_text(json.dumps({**LLAMA_CONFIG, **changes}), encoding="utf-8")
    return open_config(config_path, name="tiny")


def ask(folder: ModelFolder, library: NativeLibrary | None, device: str = "cpu") -> DtypeQuestion:
    return DtypeQuestion(folder=folder, device=device, quantization="auto", library=library)


def test_nothing_is_measured_where_nothing_can_be_won(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    assert auto_dtype(ask(folder, None), tmp_path).dtype == "float32"
    assert auto_dtype(ask(folder, None, "cuda:0"), tmp_path).dtype == "bfloat16"
    gpt = folder_of(tmp_path, architectures=["GPTNeoXForCausalLM"], model_type="gpt_neox")
    assert auto_dtype(ask(gpt, best_library()), tmp_path).dtype == "float32"
    assert not (tmp_path / "dtype").exists()


def test_a_cpu_without_bfloat16_keeps_float32(tmp_path: Path) -> None:
    choice = auto_dtype(ask(folder_of(tmp_path), library_of(VARIANTS[-1])), tmp_path)
    assert (choice.dtype, "avx2" in choice.reason) == ("float32", True)


def test_a_host_measures_once_and_another_cpu_again(tmp_path: Path) -> None:
    library = library_of(VARIANTS[0])
    question, here = ask(folder_of(tmp_path), library), Path("/proc/cpuinfo")
    first = auto_dtype(question, tmp_path)
    assert "tok/s" in first.reason
    assert auto_dtype(question, tmp_path).reason == first.reason, "times never repeat to the last digit by themselves"
    other = tmp_path / "cpuinfo"
    other.write_text(here.read_text().replace("model name\t:", "model name\t: another", 1))
    assert not list((tmp_path / "dtype").glob("*.json"))[1:]
    auto_dtype(question, tmp_path, cpu_info=other)
    assert len(list((tmp_path / "dtype").glob("*.json"))) == 2


def test_damaged_figures_are_measured_again(tmp_path: Path) -> None:
    question = ask(folder_of(tmp_path), library_of(VARIANTS[0]))
    auto_dtype(question, tmp_path)
    (kept,) = (tmp_path / "dtype").glob("*.json")
    kept.write_text('[{"dtype": "float32"', encoding="utf-8")
    auto_dtype(question, tmp_path)
    assert len(json.loads(kept.read_text())) == 2


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_kind_of_weights_can_be_tried_and_a_large_model_costs_no_more(variant: CpuVariant, tmp_path: Path) -> None:
    """Halved until a layer is small, the largest shapes are still shapes that the kernels take."""
    library = library_of(variant)
    tiny = folder_of(tmp_path).config()
    large = replace(tiny, hidden_size=4096, intermediate_size=11008, heads=32, kv_heads=8, head_dim=128, layers=32, vocab_size=32_000)
    candidates = [Candidate(dtype="float32", kind=kind) for kind in (None, *BlockKind)]
    candidates += [Candidate(dtype="bfloat16"), Candidate(dtype="bfloat16", kind=BlockKind.Q4_1)]
    for config, tried in ((tiny, candidates), (large, candidates[:1])):
        for trial in try_dtypes(library, config, tried):
            assert min(trial.prefill_token_s, trial.single_step_s, trial.rows_step_s) > 0
