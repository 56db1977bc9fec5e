"""Building the kernels: every variant compiles, the CPU's best is taken, and without a compiler there is a warning and no kernel."""

import logging
import os
import shutil
from pathlib import Path

import pytest

from common.engine.native.build import BuildError, Compiler, compile_library, find_compiler, library_path
from common.engine.native.cpu_variant import VARIANTS, CpuVariant, cpu_features, runnable_variants
from common.engine.native.library import load_library, load_variant

needs_compiler = pytest.mark.skipif(find_compiler(os.environ) is None, reason="there is no C++ compiler")
needs_cpu = pytest.mark.skipif(not runnable_variants(cpu_features()), reason="this CPU has no AVX2")


@needs_compiler
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_variant_compiles_and_runs_where_it_can(variant: CpuVariant) -> None:
    path = library_path(variant, os.environ)
    assert path.stat().st_size > 10_000
    if variant not in runnable_variants(cpu_features()):
        pytest.skip(f"compiled, not run: this CPU cannot run {variant.name}")
    assert load_variant(variant, os.environ).kernels == f"native-{variant.name}"


def test_the_best_variant_comes_first_and_needs_all_of_its_features() -> None:
    every = frozenset().union(*(variant.needs for variant in VARIANTS))
    assert [variant.name for variant in runnable_variants(every)] == ["avx512bf16", "avx512", "avx2"]
    assert [variant.name for variant in runnable_variants(every - {"avx512_bf16"})] == ["avx512", "avx2"]
    assert [variant.name for variant in runnable_variants({"avx2", "fma", "f16c", "avx512f"})] == ["avx2"]
    assert runnable_variants({"avx2"}) == ()


def test_features_are_read_from_the_first_cpu(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nflags\t\t: fpu avx2 fma\n\nprocessor : 1\nflags : none\n", encoding="utf-8")
    assert cpu_features(info) <= {"fpu", "avx2", "fma"}
    assert cpu_features(tmp_path / "missing") == frozenset()


@needs_cpu
def test_without_a_compiler_there_is_a_warning_and_no_library(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert load_library({"PATH": "", "SEGUE_CACHE_DIR": str(tmp_path)}) is None
    assert "no C++ compiler" in caplog.text


@needs_compiler
@needs_cpu
def test_what_was_built_ahead_of_time_serves_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    best = runnable_variants(cpu_features())[0]
    built = library_path(best, os.environ)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    environment = {**os.environ, "PATH": ""}
    assert library_path(best, environment).parent == built.parent
    assert load_library(environment) is not None


@needs_compiler
@needs_cpu
def test_what_an_image_brings_along_is_taken_first_and_only_for_these_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = runnable_variants(cpu_features())[0]
    built = library_path(best, os.environ)
    brought = tmp_path / "kernels" / built.parent.name
    shutil.copytree(built.parent, brought)
    environment = {**os.environ, "SEGUE_KERNELS_DIR": str(tmp_path / "kernels"), "SEGUE_CACHE_DIR": str(tmp_path / "empty")}
    assert library_path(best, environment).parent == brought
    assert not (tmp_path / "empty").exists()
    brought.rename(brought.with_name("other-sources"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
        library_path(best, {**environment, "PATH": ""})


def test_a_compiler_that_refuses_leaves_nothing_behind_and_says_why(tmp_path: Path) -> None:
    target = tmp_path / "library.so"
    with pytest.raises(BuildError, match="avx2"):
        compile_library(Compiler(command=("false",), zig=False), VARIANTS[-1], target)
    assert list(tmp_path.iterdir()) == []


@needs_cpu
def test_a_cache_that_cannot_be_written_is_a_build_error(tmp_path: Path) -> None:
    if find_compiler(os.environ) is None:
        pytest.skip("there is no C++ compiler")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(BuildError):
        library_path(VARIANTS[-1], {**os.environ, "SEGUE_CACHE_DIR": str(tmp_path / "file")})
