"""From a worker's settings to a step engine that is warm: find the model, plan its memory, load it, run it once."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from os import environ
from typing import Literal, cast

from common.engine.auto_dtype import DtypeQuestion, auto_dtype
from common.engine.check_stamp import stamp_path
from common.engine.dtype_choice import DtypeChoice
from common.engine.host_memory import available_memory_bytes, shared_memory_bytes
from common.engine.inline_steps import InlineSteps
from common.engine.memory_plan import MemoryPlan, MemoryRequest, kv_layout, plan_memory
from common.engine.model_cache import default_cache_dir
from common.engine.model_card import model_card, model_key
from common.engine.model_files import ModelFolder
from common.engine.model_source import ModelSpec, resolve_model
from common.engine.native.kernel_choice import choose_library, copies_weights
from common.engine.native.library import NativeLibrary
from common.engine.quantization_choice import Quantization, quantized_demand, weights_name
from common.engine.step_thread import StepThread
from common.engine.synthetic import StepTimes, SyntheticExecutor
from common.ports.kv_transport import KvRegion
from common.ports.step_engine import StepEngine
from common.runtime.settings import WorkerSettings
from common.values.ids import ModelKey
from common.values.kv_layout import Fingerprint, KvDtype, KvLayout
from common.values.model_card import ModelCard

Progress = Callable[[str, float | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundModel:
    """A model on this host, and the kernels that will compute it; its dtype is not settled yet."""

    folder: ModelFolder
    key: ModelKey
    library: NativeLibrary | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerModel:
    """A model that is found and planned for, not loaded yet."""

    folder: ModelFolder
    card: ModelCard
    dtype: KvDtype
    layout: KvLayout
    blocks: int
    max_num_seqs: int
    library: NativeLibrary | None
    quantization: Quantization

    @property
    def fingerprint(self) -> Fingerprint:
        kernels = "torch" if self.library is None else self.library.kernels
        return Fingerprint(
            weights=weights_name(self.card.model.revision, self.quantization), dtype=self.dtype, layout=self.layout, kernels=kernels
        )


def find_model(settings: WorkerSettings, progress: Progress) -> FoundModel:
    """Blocking: may fetch or convert the model, and build kernels. Raises ModelError for what cannot be served."""
    cache_dir = default_cache_dir(environ)
    spec = ModelSpec(
        model=settings.model,
        revision=settings.revision,
        load_format=cast("Literal['auto', 'dummy']", settings.load_format),
    )
    folder = resolve_model(spec, cache_dir, progress)
    key = model_key(folder, cache_dir=cache_dir, served_name=settings.served_model_name)
    library = None
    if settings.engine_kind == "torch" and settings.kernel_choice != "torch":
        progress("preparing kernels (built once on this host)", None)
        library = choose_library(settings.kernel_choice, settings.device, environ)
    return FoundModel(folder=folder, key=key, library=library)


def quickest_dtype(settings: WorkerSettings, folder: ModelFolder, library: NativeLibrary | None) -> DtypeChoice:
    """Blocking: what `--dtype auto` means on this host by itself. May measure, once on this host."""
    if settings.engine_kind == "synthetic":
        return DtypeChoice(dtype="float32", reason="the synthetic engine computes nothing")
    question = DtypeQuestion(folder=folder, device=settings.device, quantization=settings.quantization_choice, library=library)
    return auto_dtype(question, default_cache_dir(environ))


def prepare_model(settings: WorkerSettings, found: FoundModel, dtype: KvDtype) -> WorkerModel:
    """Blocking. Raises ModelError for what cannot be served or cannot fit."""
    folder, cache_dir = found.folder, default_cache_dir(environ)
    plan = plan_worker_memory(settings, folder, dtype, workers=1)
    card = model_card(
        folder,
        cache_dir=cache_dir,
        served_name=settings.served_model_name,
        max_model_len=plan.max_model_len,
        dtype=dtype,
        created=int(time.time()),
    )
    return WorkerModel(
        folder=folder,
        card=card,
        dtype=dtype,
        layout=_layout(settings, folder, dtype),
        blocks=plan.blocks,
        max_num_seqs=plan.max_num_seqs,
        library=found.library,
        quantization=settings.quantization_choice,
    )


def plan_worker_memory(settings: WorkerSettings, folder: ModelFolder, dtype: KvDtype, *, workers: int) -> MemoryPlan:
    """What `workers` workers with these settings take on this host."""
    config = folder.config()
    native = copies_weights(settings.kernel_choice, settings.device)
    request = MemoryRequest(
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        kv_cache_bytes=settings.kv_cache_bytes,
        max_num_batched_tokens=settings.max_num_batched_tokens,
    )
    return plan_memory(
        config,
        _layout(settings, folder, dtype),
        quantized_demand(folder, config, dtype, settings.quantization_choice, device=settings.device, native=native),
        request,
        available_bytes=available_memory_bytes(),
        workers=workers,
        shared_memory_bytes=shared_memory_bytes() if "shm" in settings.kv_tiers else None,
    )


def _layout(settings: WorkerSettings, folder: ModelFolder, dtype: KvDtype) -> KvLayout:
    """The model's; or the narrow one that was asked for, so that very many synthetic workers fit into a machine."""
    if settings.engine_kind == "torch" or settings.synthetic_kv_token_bytes is None:
        return kv_layout(folder.config(), dtype, settings.block_size)
    head_dim = settings.synthetic_kv_token_bytes // 8  # K and V of four bytes an item
    return KvLayout(layers=1, kv_heads=1, head_dim=head_dim, block_size=settings.block_size, dtype="float32")


def start_step_engine(settings: WorkerSettings, model: WorkerModel, region: KvRegion, progress: Progress) -> StepEngine:
    """Blocking: loads the weights. The only place from which torch is reached, and only for `--engine torch`."""
    threads = settings.threads or len(settings.cores or (0,))
    if settings.engine_kind == "synthetic":
        times = StepTimes(
            fixed=settings.synthetic_step_s,
            per_prefill_token=settings.synthetic_prefill_token_s,
            per_decode_row=settings.synthetic_decode_row_s,
        )
        marked = region if settings.synthetic_checks else None
        executor = SyntheticExecutor(vocab_size=model.card.vocab_size, region=marked, times=times)
        takes_time = times != StepTimes() or settings.synthetic_checks
        return StepThread(executor, threads=threads) if takes_time else InlineSteps(executor)
    from common.engine.load_model import load_model
    from common.engine.paged_attention import PAGED_ATTENTION, register_paged_attention
    from common.engine.torch_step import build_torch_executor

    register_paged_attention()
    loaded = load_model(
        model.folder,
        dtype=model.dtype,
        device=settings.device,
        attn_implementation=PAGED_ATTENTION,
        on_progress=progress,
    )
    stamp = stamp_path(
        default_cache_dir(environ), (str(model.fingerprint), settings.device, str(model.card.max_model_len), model.quantization)
    )
    if not stamp.exists():
        progress("checking the model (once on this host)", None)
    torch_executor = build_torch_executor(
        loaded,
        model.layout,
        region.blocks_address,
        region.blocks,
        settings.device,
        check=not stamp.exists(),
        max_model_len=model.card.max_model_len,
        library=model.library,
        quantization=model.quantization,
        stored=model.folder.quantized(),
    )
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.touch()
    return StepThread(torch_executor, threads=threads)
