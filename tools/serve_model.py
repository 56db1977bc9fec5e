"""Before any worker starts: find (or fetch, or convert) the model once, and decide how much memory each worker gets.

Imports the engine's model files, never torch: `serve` itself stays small. Workers are then given the resolved folder.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from common.runtime.settings import WorkerSettings
from common.values.errors import ModelError
from common.values.kv_layout import KvDtype


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """`worker` is the template with everything about the model filled in; `memory` is the plan in one line, None where
    there is nothing to plan."""

    name: str
    source: str
    worker: WorkerSettings
    memory: str | None


def prepare_model(settings: WorkerSettings, environ: Mapping[str, str], *, workers: int, say: Callable[[str], None]) -> ServedModel:
    """Raises ModelError for what cannot be found, read, or fitted into memory."""
    from common.engine.model_cache import default_cache_dir
    from common.engine.model_files import ModelFolder
    from common.engine.model_source import LoadFormat, ModelSpec, resolve_model

    told: dict[str, int] = {}

    def on_progress(what: str, fraction: float) -> None:
        quarter = int(fraction * 4)
        if told.get(what) != quarter:
            told[what] = quarter
            say(f"model: {what} {fraction:.0%}")

    spec = ModelSpec(model=settings.model, revision=settings.revision, load_format=cast("LoadFormat", settings.load_format))
    folder: ModelFolder = resolve_model(spec, default_cache_dir(environ), on_progress)
    name = settings.served_model_name or folder.name
    path = folder.config_path if folder.dummy else folder.path
    resolved = replace(settings, model=str(path.resolve()), served_model_name=name, revision=None)
    if settings.engine == "synthetic" or settings.device != "cpu":
        return ServedModel(name=name, source=str(path), worker=resolved, memory=None)
    planned, sentence = _plan(folder, resolved, workers)
    return ServedModel(name=name, source=str(path), worker=planned, memory=sentence)


def _plan(folder: object, settings: WorkerSettings, workers: int) -> tuple[WorkerSettings, str]:
    from common.engine.host_memory import available_memory_bytes, shared_memory_bytes
    from common.engine.memory_plan import MemoryRequest, kv_layout, plan_memory
    from common.engine.model_files import ModelFolder
    from common.engine.native.kernel_choice import copies_weights
    from common.engine.quantization_choice import quantized_demand

    assert isinstance(folder, ModelFolder)
    config = folder.config()
    native = copies_weights(settings.kernel_choice, settings.device)
    dtype = cast("KvDtype", "float32" if settings.dtype == "auto" else settings.dtype)
    try:
        available = available_memory_bytes()
    except OSError as error:
        raise ModelError(f"cannot tell how much memory there is ({error}); give --kv-cache-memory") from None
    plan = plan_memory(
        config,
        kv_layout(config, dtype, settings.block_size),
        quantized_demand(folder, config, dtype, settings.quantization_choice, device=settings.device, native=native),
        MemoryRequest(
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            kv_cache_bytes=settings.kv_cache_bytes,
            max_num_batched_tokens=settings.max_num_batched_tokens,
        ),
        available_bytes=available,
        workers=workers,
        shared_memory_bytes=shared_memory_bytes(Path("/dev/shm")) if "shm" in settings.kv_tiers else None,
    )
    filled = replace(settings, max_model_len=plan.max_model_len, max_num_seqs=plan.max_num_seqs, kv_cache_bytes=plan.kv_bytes)
    return filled, plan.describe()
