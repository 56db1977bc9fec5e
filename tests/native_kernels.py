"""The variants of the kernels that this machine can build and run, for tests."""

import os

import pytest

from common.engine.native.build import BuildError, library_path
from common.engine.native.cpu_variant import VARIANTS, CpuVariant, cpu_features, runnable_variants
from common.engine.native.library import NativeLibrary


def library_of(variant: CpuVariant) -> NativeLibrary:
    """Skips the test, naming the variant, where it cannot be run."""
    if variant not in runnable_variants(cpu_features()):
        pytest.skip(f"not run: this CPU cannot run {variant.name}")
    try:
        return NativeLibrary(library_path(variant, os.environ))
    except BuildError as error:
        pytest.skip(f"not run: {variant.name}: {error}")


def best_library() -> NativeLibrary:
    variants = runnable_variants(cpu_features())
    return library_of(variants[0] if variants else VARIANTS[-1])
