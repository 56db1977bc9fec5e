"""What `--kernels` means on this machine: which library a worker uses, and whether it will copy the weights. Loads no torch."""

from collections.abc import Mapping
from typing import Literal

from common.engine.native.cpu_variant import cpu_features, runnable_variants
from common.engine.native.library import NativeLibrary, load_library
from common.values.errors import ModelError

KernelChoice = Literal["auto", "native", "torch"]


def choose_library(choice: KernelChoice, device: str, environment: Mapping[str, str]) -> NativeLibrary | None:
    """None: everything runs in torch. May build the library first. ModelError where `native` was asked for and cannot be had."""
    if choice == "torch" or (choice == "auto" and device != "cpu"):
        return None
    library = load_library(environment) if device == "cpu" else None
    if library is None and choice == "native":
        raise ModelError(
            f"--kernels native: device {device}; own kernels need a CPU with AVX2 and a C++ compiler (apt install g++), see the log"
        )
    return library


def copies_weights(choice: KernelChoice, device: str) -> bool:
    """Whether each worker will have the weights in memory of its own, in the kernels' order, instead of mapping the file's."""
    return choice != "torch" and device == "cpu" and bool(runnable_variants(cpu_features()))
