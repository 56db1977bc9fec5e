"""Measures the steps of a worker with these settings on this machine: finds its model, loads it as a worker does, visits, fits."""

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from common.policy.calibration import Calibration, CalibrationSubject, fit_step_time
from common.ports.step_engine import StepEngine
from common.runtime.settings import WorkerSettings
from common.runtime.worker_calibration import calibration_subject
from common.runtime.worker_engine import WorkerModel, find_model, prepare_model, quickest_dtype, start_step_engine
from common.values.errors import SettingsError
from tools.bench_engine_machine import Machine, look_at_machine
from tools.calibration.step_shapes import ShapeLimits, StepShape, step_shapes
from tools.calibration.step_visits import StepVisitor
from tools.calibration.visit_rounds import VisitTimes, visit_in_rounds
from tools.calibration.visit_times import points_of
from tools.engine_variants import KvPool

KV_TOKENS = 16_384
"""Of the pool that is measured in: larger contexts at once would take minutes to fill, and follow the same lines."""
LEAST_SHAPES = 12
Say = Callable[[str], None]
OnVisit = Callable[[StepShape, float], None]


async def calibrate_engine(
    settings: WorkerSettings, *, budget_s: float, build: str, seed: int, say: Say, on_visit: OnVisit
) -> Calibration:
    """Blocks the loop while it loads: nothing else runs on it. Raises SegueError."""
    machine = look_at_machine(settings.cores or tuple(sorted(os.sched_getaffinity(0))))
    model = _find(settings, say)
    subject = calibration_subject(settings, model)
    started = _start(settings, model, say)
    try:
        limits = ShapeLimits(
            kv_tokens=_pool_blocks(model) * model.layout.block_size,
            max_tokens=model.card.max_model_len,
            max_rows=model.max_num_seqs,
            max_chunk=model.card.max_model_len,
        )
        shapes = step_shapes(limits)
        if len(shapes) < LEAST_SHAPES:
            raise SettingsError(f"only {len(shapes)} steps fit {limits}: give more --kv-cache-memory or --max-model-len")
        visitor = StepVisitor(started.engine, vocab_size=model.card.vocab_size, block_size=model.layout.block_size)
        found = await visit_in_rounds(
            shapes, visitor.visit, budget_s=budget_s, clock=time.monotonic, on_visit=on_visit, rng=random.Random(seed)
        )
    finally:
        await started.engine.close()
    return _calibration(found, subject, build=build, notes=_notes(found, machine))


def _find(settings: WorkerSettings, say: Say) -> WorkerModel:
    say("finding the model")
    found = find_model(settings, lambda what, _part: say(what))
    dtype = settings.asked_dtype or quickest_dtype(settings, found.folder, found.library).dtype
    return prepare_model(settings, found, dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Started:
    """The engine computes in the pool's memory: whoever holds the one holds the other."""

    engine: StepEngine
    pool: KvPool


def _start(settings: WorkerSettings, model: WorkerModel, say: Say) -> _Started:
    """A synthetic engine computes nothing in its pool, and is not to look for KV there that no prefill has made."""
    say(f"loading {model.card.model.name} in {model.dtype}")
    synthetic = settings.engine_kind == "synthetic"
    pool = KvPool(model.layout, 1 if synthetic else _pool_blocks(model))
    unchecked = replace(settings, synthetic_checks=False)
    return _Started(engine=start_step_engine(unchecked, model, pool.region, lambda what, _part: say(what)), pool=pool)


def _pool_blocks(model: WorkerModel) -> int:
    return min(model.blocks, KV_TOKENS // model.layout.block_size)


def _calibration(found: VisitTimes, subject: CalibrationSubject, *, build: str, notes: tuple[str, ...]) -> Calibration:
    points = points_of(found.times)
    if not points.prefill or not points.decode:
        raise SettingsError("not even the shortest steps were measured in that time: give more --seconds")
    return Calibration(
        subject=subject,
        build=build,
        measured_at=time.time(),
        fitted=fit_step_time([point.sample for point in points.prefill], [point.sample for point in points.decode]),
        prefill=points.prefill,
        decode=points.decode,
        mixed=points.mixed,
        notes=notes,
    )


def _notes(found: VisitTimes, machine: Machine) -> tuple[str, ...]:
    notes = [f"{found.rounds} rounds of {len(found.times)} steps"]
    if found.left_out:
        notes.append(f"left out, for they would take too long: {', '.join(map(str, found.left_out))}")
    if not machine.quiet:
        notes.append(f"others used {machine.busy_share:.0%} of the cores before the start: measure again when it is quiet")
    return tuple(notes)
