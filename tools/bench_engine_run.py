"""From the options of `bench-engine` to its report: find the model, load every subject, measure in rounds. Loads torch."""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import cast

from common.engine.machine_peaks import Clock, MachinePeaks
from common.engine.model_cache import default_cache_dir
from common.engine.model_config import ModelConfig
from common.engine.model_files import ModelFolder
from common.engine.model_source import ModelSpec, resolve_model
from common.engine.native.library import load_library
from common.engine.native.native_sampler import choose_sampler
from common.engine.sampler_cost import SamplerCost
from common.engine.step_limits import check_counted
from common.engine.torch_peaks import products
from common.values.errors import ModelError, SegueError
from common.values.kv_layout import KvDtype
from common.values.sampling import SamplingParameters
from tools.bench_engine_machine import look_at_machine
from tools.bench_engine_options import FLOATS, FORWARDS, BenchOptions
from tools.bench_engine_peers import LlamaSubject, Missing, VllmOptions, VllmSubject, find_llama, find_vllm, without_blocks
from tools.bench_engine_report import Report, make_report
from tools.bench_engine_rounds import Bench, Draw
from tools.bench_engine_subject import Case, DecodeCase, EngineSubject, PrefillCase, Subject, blocks_needed
from tools.engine_variants import Forward, KvPool, Variant, Weights, kv_pool, load_variant
from tools.step_weight_bytes import step_weight_bytes

_BLOCK_SIZE = 16
_SLACK_TOKENS = 128
_PEER_TOKENS = 2048
_PEER_SEQUENCES = 32
"""What vLLM is at least prepared for: the same in most runs, so that it finds what it has compiled before."""
Progress = Callable[[str], None]


def measure(options: BenchOptions, on_progress: Progress) -> Report:
    """Raises SegueError where the model cannot be measured; a forward or a peer that is not there is named in the report."""
    machine = look_at_machine(options.cores)
    clock: Clock = time.process_time if options.clock == "cpu" else time.perf_counter
    folder = resolve_model(ModelSpec(model=options.model, load_format=options.load_format), default_cache_dir(os.environ))
    config = folder.config()
    check_counted(config)
    cases = _cases(options)
    with ExitStack() as owned:
        subjects, missing = _own_subjects(options, folder, cases, clock, on_progress)
        for peers, absent in (_vllm(options, folder, owned, on_progress), _llama(options)):
            subjects += peers
            missing += absent
        bench = Bench(
            peaks=MachinePeaks(os.environ, clock, threads=options.thread_count),
            products=products(options.thread_count, clock, os.environ),
            subjects=subjects,
            cases=cases,
            samplers=_samplers(config, options),
            clock=clock,
            steps=options.steps,
        )
        samples = bench.run(options.rounds, on_progress)
    missing += [
        Missing(name=loop.name, reason="not run: this CPU, or this build, does not have it") for loop in bench.peaks.absent_loops
    ]
    return make_report(
        samples,
        subjects,
        config,
        model=folder.name,
        machine=machine,
        clock=options.clock,
        threads=options.thread_count,
        rounds=options.rounds,
        weight_bytes=_weight_bytes(folder, subjects),
        missing=missing,
    )


def _cases(options: BenchOptions) -> list[Case]:
    prefill: list[Case] = [PrefillCase(tokens=tokens) for tokens in options.prefill]
    return prefill + [DecodeCase(batch=batch, context=context) for context in options.contexts for batch in options.batches]


def _own_subjects(
    options: BenchOptions, folder: ModelFolder, cases: Sequence[Case], clock: Clock, on_progress: Progress
) -> tuple[list[Subject], list[Missing]]:
    """A forward that was asked for by name must work; one that was not may be missing."""
    subjects: list[Subject] = []
    missing: list[Missing] = []
    blocks = blocks_needed(cases, steps=options.steps, block_size=_BLOCK_SIZE)
    pools: dict[KvDtype, KvPool] = {}
    for variant in _variants(options):
        on_progress(f"loading {variant.name}")
        if variant.dtype not in pools:
            pools[variant.dtype] = kv_pool(folder, variant.dtype, block_size=_BLOCK_SIZE, blocks=blocks)
        try:
            loaded = load_variant(folder, variant, pools[variant.dtype], threads=options.thread_count)
        except ModelError as error:
            if options.forwards is not None and not variant.quantized:
                raise
            missing.append(Missing(name=variant.name, reason=str(error)))
            continue
        vocabulary = folder.config().vocab_size
        subjects.append(EngineSubject(loaded, vocab_size=vocabulary, clock=clock, chunk=options.max_num_batched_tokens))
    return subjects, missing


def _variants(options: BenchOptions) -> list[Variant]:
    """Torch has no products with quantised weights: it would compute with their expansion, as it does in float32."""
    pairs = [(weights, forward) for weights in options.weights for forward in options.forwards or FORWARDS]
    variants = [Variant(forward=cast("Forward", forward), weights=cast("Weights", weights)) for weights, forward in pairs]
    return [variant for variant in variants if variant.forward == "native" or not variant.quantized]


def _weight_bytes(folder: ModelFolder, subjects: Sequence[Subject]) -> dict[str, float]:
    found: dict[str, float] = {}
    for weights in {subject.weights for subject in subjects}:
        with suppress(ModelError):
            found[weights] = step_weight_bytes(folder, weights)
    return found


def _vllm(options: BenchOptions, folder: ModelFolder, owned: ExitStack, on_progress: Progress) -> tuple[list[Subject], list[Missing]]:
    python = find_vllm(options.vllm_python)
    if isinstance(python, Missing):
        return [], [python]
    longest = max((*options.prefill, *options.contexts))
    own = Path(owned.enter_context(tempfile.TemporaryDirectory(prefix="segue-bench-")))
    log, model = own / "vllm.log", without_blocks(folder, own / "model")
    vllm = VllmOptions(
        python=python,
        cores=options.cores[: options.thread_count],
        clock=options.clock,
        max_model_len=min(folder.config().max_positions, max(_PEER_TOKENS, longest + options.steps + _SLACK_TOKENS)),
        max_num_seqs=max(_PEER_SEQUENCES, *options.batches),
        log=log,
    )
    subjects: list[Subject] = []
    missing: list[Missing] = []
    for weights in (weights for weights in options.weights if weights in FLOATS):
        on_progress(f"loading vLLM {weights}, which compiles for a minute or more")
        try:
            subject = VllmSubject(model, weights, vllm, dummy=folder.dummy)
        except SegueError:
            missing.append(Missing(name=f"vLLM {weights}", reason=f"did not start: {_last_line(log)}"))
            continue
        owned.callback(subject.close)
        subjects.append(subject)
    return subjects, missing


def _last_line(log: Path) -> str:
    """What went wrong, where the log says it: its end may be a bar of progress."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["it said nothing"])[-1][:300]


def _llama(options: BenchOptions) -> tuple[list[Subject], list[Missing]]:
    folder = find_llama(options.llama)
    if isinstance(folder, Missing):
        return [], [folder]
    if not options.llama_model:
        return [], [Missing(name="llama.cpp", reason="not measured: --llama-model names its GGUF files")]
    threads = options.thread_count
    return [LlamaSubject(folder, path, weights, threads=threads, clock=options.clock) for weights, path in options.llama_model], []


def _samplers(config: ModelConfig, options: BenchOptions) -> list[tuple[Draw, SamplerCost]]:
    sampler = choose_sampler(load_library(os.environ), "cpu")
    sampler.prepare_thread(options.thread_count)
    ways = {
        "greedy": SamplingParameters(max_tokens=10, seed=1, temperature=0.0),
        "temperature 0.8, top-p 0.95": SamplingParameters(max_tokens=10, seed=1, temperature=0.8, top_p=0.95),
    }
    return [
        (Draw(rows=rows, how=how), SamplerCost(sampler, vocab_size=config.vocab_size, rows=rows, sampling=sampling))
        for rows in options.batches
        for how, sampling in ways.items()
    ]
