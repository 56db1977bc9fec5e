"""A model on this host's disk: which files belong to it, whether they are whole, and one digest that names them all.

Nothing here loads weights or runs code that came with a model: only safetensors headers and JSON are read.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import xxhash

from common.engine.model_cache import file_digest
from common.engine.model_config import JsonFields, ModelConfig, read_config
from common.engine.quantized_file import StoredMatrix, quantized_matrices
from common.engine.safetensors_file import TensorHeader, read_tensor_headers
from common.values.errors import ModelError

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """A resolved model. `weights` is empty where the weights are random (`--load-format dummy`).

    `name` is what the model is called unless the user says otherwise.
    """

    path: Path
    name: str
    config_path: Path
    weights: tuple[Path, ...]

    @property
    def dummy(self) -> bool:
        return not self.weights

    def config(self) -> ModelConfig:
        return read_config(self.config_path)

    def tensor_headers(self) -> list[TensorHeader]:
        return [header for path in self.weights for header in read_tensor_headers(path)]

    def quantized(self) -> dict[str, StoredMatrix]:
        """The matrices that the folder also keeps quantised, with the same meaning."""
        return {} if self.dummy or _is_bare(self) else quantized_matrices(self.path)


def open_folder(path: Path, *, name: str, dummy: bool) -> ModelFolder:
    """Check a folder with config.json and safetensors (weights are not needed for `dummy`).

    Raises ModelError for what cannot be served, and for weights that are cut off.
    """
    config_path = path / "config.json"
    if not config_path.is_file():
        raise ModelError(f"{path} holds no config.json: it is not a model folder")
    refuse_foreign_code(config_path)
    read_config(config_path)
    folder = ModelFolder(path=path, name=name, config_path=config_path, weights=() if dummy else _weight_files(path))
    folder.tensor_headers()
    folder.quantized()
    if not dummy and not (path / "tokenizer.json").is_file():
        raise ModelError(
            f"{path} holds no tokenizer.json, the only tokenizer format that Segue reads; make it once with "
            "transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    return folder


def open_config(config_path: Path, *, name: str) -> ModelFolder:
    """Random weights for a bare configuration file."""
    refuse_foreign_code(config_path)
    read_config(config_path)
    return ModelFolder(path=config_path.parent, name=name, config_path=config_path, weights=())


def refuse_foreign_code(config_path: Path) -> None:
    """A model that needs Python from its own folder is refused; one that transformers has itself is loaded with that code."""
    fields = JsonFields(config_path)
    model_type = fields.text("model_type")
    if fields.has("auto_map") and not _is_transformers_own(model_type):
        raise ModelError(
            f"{config_path}: the model {model_type!r} needs code of its own; Segue never runs code that comes with a model"
        )


def _is_transformers_own(model_type: str) -> bool:
    """Looked up as a folder of the installed package: importing transformers takes seconds, and torch."""
    specification = importlib.util.find_spec("transformers")
    if specification is None or specification.origin is None:
        return False
    module = model_type.removesuffix("_text").replace("-", "_")
    return module.isidentifier() and (Path(specification.origin).parent / "models" / module).is_dir()


def _weight_files(path: Path) -> tuple[Path, ...]:
    if (index := path / INDEX_FILE).is_file():
        return _shards(path, index)
    if (single := path / WEIGHTS_FILE).is_file():
        return (single,)
    if (path / "adapter_config.json").is_file():
        raise ModelError(f"{path} is an adapter without its base model: merge it into the base model and save as safetensors")
    pickles = sorted(found.name for pattern in ("*.bin", "*.pt", "*.pth") for found in path.glob(pattern))
    if pickles:
        raise ModelError(
            f"{path} holds only {pickles[0]}, a pickle, which can run code when it is read. Convert it to safetensors: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, safe_serialization=True)"
        )
    raise ModelError(f"{path} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}")


def _shards(path: Path, index: Path) -> tuple[Path, ...]:
    names = JsonFields(index).mapped_texts("weight_map")
    shards = tuple(path / name for name in sorted(set(names)))
    if not shards or any(shard.parent != path for shard in shards):
        raise ModelError(f"{index} is damaged: its weight_map names no files of this folder")
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise ModelError(f"{path} lacks {missing[0]} ({len(missing)} of {len(shards)} weight files are missing): fetch it again")
    return shards


def folder_digest(folder: ModelFolder, cache_dir: Path) -> str:
    """16 hex digits that are equal on two hosts exactly where configuration, text files and weights are equal."""
    digest = xxhash.xxh3_128()
    digest.update(folder.config_path.read_bytes())
    for name in _TEXT_FILES:
        digest.update(f"|{name}|".encode())
        if (path := text_file(folder, name)) is not None:
            digest.update(path.read_bytes())
    for path in folder.weights:
        digest.update(f"|{path.name}|{file_digest(path, cache_dir)}".encode())
    return digest.hexdigest()[:16]


def text_file(folder: ModelFolder, name: str) -> Path | None:
    """A file beside the configuration, where the model has it."""
    path = folder.path / name
    return path if not _is_bare(folder) and path.is_file() else None


def _is_bare(folder: ModelFolder) -> bool:
    """A configuration file that was named itself owns none of the files that happen to lie beside it."""
    return folder.config_path.name != "config.json"
