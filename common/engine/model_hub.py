"""Fetches a model from the hub: safetensors and text files only, once per host however many processes start."""

import os
import re
from pathlib import Path

from common.engine.model_cache import Progress, host_lock
from common.values.errors import ModelError

_TEXT_PATTERNS = ("*.json", "*.txt", "*.jinja", "*.model")
_WEIGHT_PATTERNS = ("*.safetensors",)
_IGNORED = ("original/*", "consolidated*", "*/*.safetensors", "onnx/*")
_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


def is_hub_name(model: str) -> bool:
    """`owner/name`, or one of the hub's few names without an owner."""
    return bool(_NAME.match(model)) and not model.endswith((".gguf", ".json", ".safetensors"))


def fetch_model(name: str, *, revision: str | None, weights: bool, cache_dir: Path, on_progress: Progress) -> Path:
    """The folder of the fetched model, in the hub's own cache.

    HF_TOKEN, HF_HUB_OFFLINE, HF_HOME and HF_ENDPOINT are respected by the hub's client. Raises ModelError with what to do.
    """
    lock = f"hub-{name.replace('/', '--')}"
    with host_lock(cache_dir, lock, waiting=lambda: on_progress(f"another process fetches {name}; waiting for it", 0.0)):
        on_progress(f"fetching {name} from the model hub", 0.0)
        return _snapshot(name, revision, [*_TEXT_PATTERNS, *(_WEIGHT_PATTERNS if weights else ())])


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=list(_IGNORED)))
    except errors.GatedRepoError as error:
        raise ModelError(f"{name} is gated: accept its terms on the hub, then set HF_TOKEN to a token of that account") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision {revision!r} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"there is no folder, no .gguf file and no hub model named {name} (a private one needs HF_TOKEN)") from error
    except errors.HFValidationError as error:
        raise ModelError(f"{name} is neither a file or folder here, nor a name that a model hub can have") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelError(_unreachable(name)) from error
    except (errors.HfHubHTTPError, OSError, RuntimeError) as error:
        raise ModelError(f"fetching {name} from the model hub failed: {type(error).__name__}: {error}") from error


def _unreachable(name: str) -> str:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return f"{name} is not in this host's hub cache, and HF_HUB_OFFLINE forbids fetching it"
    return f"{name} is no file or folder here, nor in the hub cache, and the model hub cannot be reached: name a folder or .gguf file"
