"""Converts a GGUF file once into a folder that transformers reads: dequantised to float32, tensor by tensor.

Beside it lie the blocks of the tensors that our own kernels can use as they are; they mean the same numbers.

The folder's name carries the digest of the file and the version of this converter: another file, or a better converter, gives another
folder; the same file elsewhere finds the same one.
"""

import json
import shutil
from pathlib import Path

from common.engine.gguf_config import refuse_unsupported, transformers_config
from common.engine.gguf_reader import GgufFile
from common.engine.gguf_tensors import parameter_bytes, quantized_to_write, tensors_to_write
from common.engine.model_cache import Progress, file_digest, host_lock, make_folder, publish_folder, require_room
from common.engine.model_files import WEIGHTS_FILE, open_folder
from common.engine.quantized_file import QUANTIZED_FILE, write_quantized_file
from common.engine.safetensors_file import write_tensor_file
from common.engine.tokenizer_from_gguf import Vocabulary, read_vocabulary, tokenizer_from_gguf
from common.values.errors import ModelError

CONVERTER_VERSION = 2
_END_TOKENS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
_NAMED_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def converted_folder(source: Path, cache_dir: Path, on_progress: Progress) -> Path:
    """The folder of the converted file, made now where it is not there. One process of a host converts, others wait."""
    target = make_folder(cache_dir / "converted") / f"{file_digest(source, cache_dir)}-v{CONVERTER_VERSION}"
    if _is_whole(target):
        return target
    with host_lock(cache_dir, target.name, waiting=lambda: on_progress("another process converts this model; waiting for it", 0.0)):
        if not _is_whole(target):
            shutil.rmtree(target, ignore_errors=True)
            publish_folder(target, lambda folder: convert(source, folder, on_progress))
    return target


def _is_whole(folder: Path) -> bool:
    """A folder that was damaged after it was made is made again."""
    if not folder.is_dir():
        return False
    try:
        open_folder(folder, name=folder.name, dummy=False)
    except ModelError:
        return False
    return True


def convert(source: Path, folder: Path, on_progress: Progress) -> None:
    """Write config.json, model.safetensors, tokenizer.json, tokenizer_config.json and generation_config.json into `folder`.

    Raises ModelError for a file that cannot be converted, OSError where the folder cannot be written.
    """
    try:
        _convert(source, folder, on_progress)
    except (ModelError, OSError):
        raise
    except Exception as error:  # numbers of a damaged file reach numpy and the tokenizer library, which raise many kinds
        raise ModelError(f"{source} is damaged: {type(error).__name__}: {error}") from error


def _convert(source: Path, folder: Path, on_progress: Progress) -> None:
    on_progress(f"reading {source.name}", 0.0)
    file = GgufFile(source)
    refuse_unsupported(file)
    tensors, (quantized, kinds) = tensors_to_write(file), quantized_to_write(file)
    require_room(folder, parameter_bytes(file) + sum(tensor.stored_bytes for tensor in quantized))
    vocabulary = read_vocabulary(file)
    _write_json(folder / "config.json", transformers_config(file))
    _write_json(folder / "generation_config.json", _generation_config(file))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(file, vocabulary))
    tokenizer_from_gguf(file).save(str(folder / "tokenizer.json"))
    write_tensor_file(folder / WEIGHTS_FILE, tensors, lambda part: on_progress(f"converting {source.name}", part))
    write_quantized_file(folder / QUANTIZED_FILE, quantized, kinds)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def _generation_config(file: GgufFile) -> dict[str, int | list[int]]:
    """All tokens that end a turn, the sequence's end first."""
    ends = [number for key in _END_TOKENS if (number := file.optional_integer(key)) is not None]
    unique = list(dict.fromkeys(ends))
    bos = file.optional_integer("tokenizer.ggml.bos_token_id")
    config: dict[str, int | list[int]] = {} if bos is None else {"bos_token_id": bos}
    if unique:
        config["eos_token_id"] = unique[0] if len(unique) == 1 else unique
    return config


def _tokenizer_config(file: GgufFile, vocabulary: Vocabulary) -> dict[str, str | int]:
    config: dict[str, str | int] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in _NAMED_TOKENS.items():
        token = vocabulary.text(file.optional_integer(f"tokenizer.ggml.{key}_token_id"))
        if token is not None:
            config[name] = token
    if (template := file.optional_text("tokenizer.chat_template")) is not None:
        config["chat_template"] = template
    return config
