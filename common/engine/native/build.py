"""Builds the kernels' library once on this host, or ahead of time in an image: `python -m common.engine.native.build`.

A library lies in the cache under a digest of the sources and flags, and carries the compiler's digest in its name. Where there
is no compiler, one that was built before from the same sources serves. What an image brings along lies in a folder of its own
(`SEGUE_KERNELS_DIR`), because volumes are mounted over caches, and is taken before anything is compiled. A library appears by
one rename, under a lock of the host, so that workers that start together build once and never load half a file.
"""

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from common.engine.model_cache import default_cache_dir, host_lock, make_folder
from common.engine.native.cpu_variant import VARIANTS, CpuVariant, cpu_features, runnable_variants
from common.values.errors import ModelError

SOURCES = Path(__file__).parent
_COMMON_FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC", "-pthread")
"""Without contraction: a compiler's own choice of fused operations would depend on how a loop was cut."""
_LONGEST_BUILD_S = 600.0

logger = logging.getLogger(__name__)


class BuildError(Exception):
    """The compiler refused, or there is none. The torch path takes over, so this never reaches a user as an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiler:
    """How to call it. `zig` takes its CPU in another form."""

    command: tuple[str, ...]
    zig: bool

    def version(self) -> str:
        done = subprocess.run([*self.command, "--version"], capture_output=True, text=True, timeout=_LONGEST_BUILD_S, check=False)
        if done.returncode != 0:
            raise BuildError(f"{self.command[0]} --version failed: {done.stderr.strip()[-200:]}")
        return done.stdout

    def flags(self, variant: CpuVariant) -> tuple[str, ...]:
        return (*_COMMON_FLAGS, f"-march={variant.zig_march}") if self.zig else (*_COMMON_FLAGS, *variant.flags)


def find_compiler(environment: Mapping[str, str]) -> Compiler | None:
    """`c++` on PATH, else Zig's where its package is installed."""
    path = environment.get("PATH", "")
    if (found := shutil.which("c++", path=path)) is not None:
        return Compiler(command=(found,), zig=False)
    if importlib.util.find_spec("ziglang") is not None:
        return Compiler(command=(sys.executable, "-m", "ziglang", "c++"), zig=True)
    return None


def library_path(variant: CpuVariant, environment: Mapping[str, str]) -> Path:
    """The built library of this variant, built now if need be. Raises BuildError."""
    digest = _source_digest()
    if (brought := environment.get("SEGUE_KERNELS_DIR")) and (found := _built(Path(brought) / digest, variant)) is not None:
        return found
    folder = default_cache_dir(environment) / "native" / digest
    compiler = find_compiler(environment)
    if compiler is None:
        if (found := _built(folder, variant)) is None:
            raise BuildError("there is no C++ compiler (c++ on PATH, or the package ziglang), and nothing was built before")
        return found
    identity = "\n".join((*compiler.flags(variant), compiler.version()))
    target = folder / f"{variant.name}-{xxhash.xxh3_64_hexdigest(identity.encode())}.so"
    if not target.exists():
        try:
            make_folder(folder)
            with host_lock(default_cache_dir(environment), f"native-{folder.name}-{variant.name}", waiting=lambda: None):
                if not target.exists():
                    compile_library(compiler, variant, target)
        except (ModelError, OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"the library cannot be built in {folder}: {error}") from error
    return target


def _built(folder: Path, variant: CpuVariant) -> Path | None:
    """Whatever compiler made it."""
    return next(iter(sorted(folder.glob(f"{variant.name}-*.so"))), None)


def compile_library(compiler: Compiler, variant: CpuVariant, target: Path) -> None:
    """Raises BuildError with the last lines of what the compiler said."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    units = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    command: Sequence[str] = (*compiler.command, *compiler.flags(variant), *units, "-o", str(partial))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_BUILD_S, check=False)
        if done.returncode != 0:
            raise BuildError(f"{compiler.command[0]} failed on the {variant.name} kernels: {done.stderr.strip()[-600:]}")
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
    logger.info("kernels built", extra={"variant": variant.name, "path": str(target)})


def _source_digest() -> str:
    digest = xxhash.xxh3_64()
    for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def main() -> int:
    """Build every variant, and say which of them this CPU can run."""
    here = {variant.name for variant in runnable_variants(cpu_features())}
    failed = 0
    for variant in VARIANTS:
        try:
            path = library_path(variant, os.environ)
        except BuildError as error:
            failed += 1
            print(f"{variant.name}: not built: {error}", file=sys.stderr)
        else:
            print(f"{variant.name}: {path} ({'runs' if variant.name in here else 'does not run'} on this CPU)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
