"""Before any worker starts: find (or fetch, or convert) the model once, and decide how much memory each worker gets.

Imports the engine's model files, never torch: `serve` itself stays small. Workers are then given the resolved folder.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from common.runtime.settings import WorkerSettings
from common.values.errors import ModelError
from common.values.ids import ModelKey
from common.values.kv_layout import KvDtype

if TYPE_CHECKING:
    from common.engine.model_files import ModelFolder

AskMesh = Callable[[ModelKey], KvDtype | None]
"""The dtype that the workers of a model have settled on, where they run already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """`worker` is the template with everything about the model filled in; `memory` is the plan in one line, None where
    there is nothing to plan; `dtype` says in a line what was chosen and why, None where it was asked for."""

    name: str
    source: str
    worker: WorkerSettings
    memory: str | None
    dtype: str | None = None


def prepare_model(
    settings: WorkerSettings, environ: Mapping[str, str], *, workers: int, say: Callable[[str], None], ask_mesh: AskMesh
) -> ServedModel:
    """Raises ModelError for what cannot be found, read, or fitted into memory."""
    from common.engine.model_cache import default_cache_dir
    from common.engine.model_source import LoadFormat, ModelSpec, resolve_model

    told: dict[str, int] = {}

    def on_progress(what: str, fraction: float) -> None:
        quarter = int(fraction * 4)
        if told.get(what) != quarter:
            told[what] = quarter
            say(f"model: {what} {fraction:.0%}")

    spec = ModelSpec(model=settings.model, revision=settings.revision, load_format=cast("LoadFormat", settings.load_format))
    folder = resolve_model(spec, default_cache_dir(environ), on_progress)
    name = settings.served_model_name or folder.name
    path = folder.config_path if folder.dummy else folder.path
    resolved = replace(settings, model=str(path.resolve()), served_model_name=name, revision=None)
    if settings.engine == "synthetic" or settings.device != "cpu":
        return ServedModel(name=name, source=str(path), worker=resolved, memory=None)
    dtype, why = _choose_dtype(folder, resolved, environ, say, ask_mesh)
    planned, sentence = _plan(folder, resolved, dtype, workers)
    return ServedModel(name=name, source=str(path), worker=planned, memory=sentence, dtype=why)


def _choose_dtype(
    folder: "ModelFolder", settings: WorkerSettings, environ: Mapping[str, str], say: Callable[[str], None], ask_mesh: AskMesh
) -> tuple[KvDtype, str | None]:
    """What the workers will settle on, known here first because memory is planned for it. They are not told: they find what was
    measured here, and agree among all workers of the mesh."""
    if settings.asked_dtype is not None:
        return settings.asked_dtype, None
    from common.engine.model_cache import default_cache_dir
    from common.engine.model_card import model_key
    from common.engine.native.kernel_choice import choose_library
    from common.runtime.worker_engine import quickest_dtype

    fixed = ask_mesh(model_key(folder, cache_dir=default_cache_dir(environ), served_name=settings.served_model_name))
    if fixed is not None:
        return fixed, f"{fixed}: the mesh computes this model in it"
    say("model: preparing kernels and measuring dtypes (once on this host)")
    choice = quickest_dtype(settings, folder, choose_library(settings.kernel_choice, settings.device, environ))
    return choice.dtype, f"{choice.dtype}: {choice.reason}"


def _plan(folder: "ModelFolder", settings: WorkerSettings, dtype: KvDtype, workers: int) -> tuple[WorkerSettings, str]:
    from common.engine.host_memory import available_memory_bytes, shared_memory_bytes
    from common.engine.memory_plan import MemoryRequest, kv_layout, plan_memory
    from common.engine.native.kernel_choice import copies_weights
    from common.engine.quantization_choice import quantized_demand

    config = folder.config()
    native = copies_weights(settings.kernel_choice, settings.device)
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
