"""Loads a resolved model into torch: transformers' own modules, weights mapped from safetensors where the dtype allows it.

No code of a model's own is ever run and nothing is fetched: the folder was resolved before.
"""

from collections.abc import Sequence
from typing import Final

import torch
import transformers
from transformers.utils.logging import disable_progress_bar

from common.engine.model_cache import Progress, no_progress
from common.engine.model_config import ModelConfig
from common.engine.model_files import ModelFolder
from common.values.errors import ModelError
from common.values.kv_layout import KvDtype

_DUMMY_SEED: Final = 20_111
_DTYPES: dict[KvDtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_Entry = str | tuple[str, Sequence[int], Sequence[int]]


def load_model(
    folder: ModelFolder,
    *,
    dtype: KvDtype,
    device: str = "cpu",
    attn_implementation: str = "eager",
    on_progress: Progress = no_progress,
) -> torch.nn.Module:
    """The model in inference mode on `device`. `attn_implementation` must be registered with transformers before.

    A folder without weights gets random ones, the same in every process. Raises ModelError, never transformers' own errors.
    """
    target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"--device {device}: this machine or this torch build has no CUDA device")
    disable_progress_bar()  # type: ignore[no-untyped-call]
    on_progress(f"loading {folder.name}", 0.0)
    expected = folder.config()
    config = _transformers_config(folder)
    _compare(expected, config)
    try:
        model = (
            _random_model(config, dtype, attn_implementation)
            if folder.dummy
            else _read_model(folder, config, dtype, attn_implementation)
        )
        model = model.to(target).eval().requires_grad_(requires_grad=False)
    except ModelError:
        raise
    except Exception as error:  # a damaged model reaches torch and transformers, which raise many kinds
        raise ModelError(f"loading {folder.name} from {folder.path} failed: {type(error).__name__}: {error}") from error
    on_progress(f"loaded {folder.name}", 1.0)
    return model


def _transformers_config(folder: ModelFolder) -> transformers.PreTrainedConfig:
    try:
        config: transformers.PreTrainedConfig = transformers.AutoConfig.from_pretrained(
            str(folder.config_path), local_files_only=True, trust_remote_code=False
        )
        return config
    except Exception as error:  # validators of transformers raise many kinds; each means that this configuration is no good
        raise ModelError(f"{folder.config_path} is not a configuration that transformers reads: {error}") from error


def _compare(expected: ModelConfig, config: transformers.PreTrainedConfig) -> None:
    """The KV region was planned from our own reading of config.json; transformers must mean the same."""
    heads = int(config.num_attention_heads)
    theirs = {
        "layers": int(config.num_hidden_layers),
        "kv_heads": int(getattr(config, "num_key_value_heads", None) or heads),
        "head_dim": int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        "vocab_size": int(config.vocab_size),
    }
    for name, value in theirs.items():
        if getattr(expected, name) != value:
            raise ModelError(f"{expected.architecture}: {name} is {getattr(expected, name)} in config.json, {value} in transformers")


def _read_model(
    folder: ModelFolder, config: transformers.PreTrainedConfig, dtype: KvDtype, attn_implementation: str
) -> torch.nn.Module:
    loaded: tuple[torch.nn.Module, dict[str, list[_Entry]]] = transformers.AutoModelForCausalLM.from_pretrained(  # type: ignore[assignment]
        str(folder.path),
        config=config,
        dtype=_DTYPES[dtype],
        attn_implementation=attn_implementation,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, by name: transformers would only point to a table that it prints
    )
    model, report = loaded
    for problem in ("missing_keys", "mismatched_keys"):
        if names := sorted(_in_words(entry) for entry in report.get(problem, ())):
            raise ModelError(
                f"{folder.path}: {len(names)} tensors ({problem.replace('_', ' ')}) do not fit {folder.name}, first {names[0]}"
            )
    return model


def _in_words(entry: _Entry) -> str:
    """A tensor's name; with the shape that it has, and the one that it should have, where those differ."""
    return entry if isinstance(entry, str) else f"{entry[0]}, which is {list(entry[1])} instead of {list(entry[2])}"


def _random_model(config: transformers.PreTrainedConfig, dtype: KvDtype, attn_implementation: str) -> torch.nn.Module:
    """Random weights by the model's own initialisation. Drawn in float32 from a fixed seed, so that all workers agree."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_DUMMY_SEED)
        model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32, attn_implementation=attn_implementation, trust_remote_code=False
        )
    return model.to(_DTYPES[dtype])
