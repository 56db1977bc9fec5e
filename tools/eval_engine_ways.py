"""All that `eval-engine` runs, one model in memory after another beside the reference."""

import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from common.engine.memory_plan import kv_layout
from common.engine.model_files import ModelFolder
from common.ports.kv_transport import KvRegion
from common.values.errors import ModelError, SegueError
from common.values.kv_layout import KvLayout
from tools.engine_variants import Forward, KvPool, Variant, Weights, load_watched
from tools.eval_engine_compare import Proof, agreement, prove
from tools.eval_engine_material import Material
from tools.eval_engine_mesh import MeshPlan, running_workers
from tools.eval_engine_run import Continuation, continuations
from tools.eval_engine_table import EvalReport, WeightsFound

if TYPE_CHECKING:
    from common.engine.watched_forward import WatchedModel

BLOCK_SIZE = 16
CHUNK = 64
MOST = 16
WAYS: tuple[tuple[str, int, int | None], ...] = (
    ("one at a time, whole", 1, None),
    ("batches of 4, whole", 4, None),
    (f"batches of {MOST}, whole", MOST, None),
    (f"batches of {MOST}, in chunks of {CHUNK}", MOST, CHUNK),
)


class Evaluation:
    """`run` makes the report. Progress goes to standard error."""

    def __init__(self, folder: ModelFolder, material: Material, *, forward: Forward, new_tokens: int, threads: int) -> None:
        from common.engine.reference_model import ReferenceModel

        self._folder = folder
        self._material = material
        self._forward = forward
        self._new_tokens = new_tokens
        self._threads = threads
        self._reference: ReferenceModel = ReferenceModel(folder, threads=threads)
        self._pool: KvPool | None = None
        self._shortfalls: dict[tuple[int, tuple[int, ...]], list[float]] = {}

    async def run(self, weights: Sequence[str]) -> EvalReport:
        proofs, batched = self._engine_proofs()
        proofs += await self._mesh_proofs(batched)
        found = [self._other(name, batched) for name in weights]  # type: ignore[arg-type]
        return EvalReport(
            model=self._folder.name,
            forward=self._forward,
            new_tokens=self._new_tokens,
            prompt_lengths=tuple(sorted(map(len, self._material.prompts))),
            proofs=tuple(proofs),
            weights=tuple(one for one in found if one is not None),
        )

    def _engine_proofs(self) -> tuple[list[Proof], list[Continuation]]:
        """Also the answers of the batches of MOST, with which other weights are compared."""
        watched = self._load("float32")
        first: list[Continuation] = []
        whole: list[Continuation] = []
        proofs = []
        for way, batch, chunk in WAYS:
            _say(f"float32, {way}")
            began = time.perf_counter()
            made = continuations(watched, self._material.prompts, new_tokens=self._new_tokens, batch=batch, chunk=chunk)
            proofs.append(self._prove(way, made, first or made, seconds=time.perf_counter() - began, comparable_bits=True))
            first = first or made
            whole = made if batch == MOST and chunk is None else whole
        return proofs, whole

    async def _mesh_proofs(self, engine: Sequence[Continuation]) -> list[Proof]:
        _say("float32, loading two workers")
        layout = kv_layout(self._folder.config(), "float32", BLOCK_SIZE)
        plan = MeshPlan(
            card=self._material.card,
            layout=layout,
            blocks=self._blocks(layout),
            sequences=MOST,
            load=lambda region: self._load_into("float32", layout, region),
        )
        proofs: list[Proof] = []
        alone: list[Continuation] = []
        async with running_workers(plan) as mesh:
            for way, moved in (("on one worker (colocated)", False), ("prefilled on one worker, decoded on another", True)):
                _say(f"float32, {way}")
                began = time.perf_counter()
                made = await mesh.answers(self._material.prompts, new_tokens=self._new_tokens, moved=moved)
                seconds = time.perf_counter() - began
                expected = len(made) if moved and self._new_tokens > 1 else 0
                if mesh.moved != expected:
                    raise SegueError(f"{mesh.moved} of {expected} sequences were handed over")
                same_bits = [one.bits for one in made] == [one.bits for one in alone] if alone else None
                proof = await asyncio.to_thread(self._prove, way, made, engine, seconds=seconds, comparable_bits=False)
                proofs.append(replace(proof, same_bits=same_bits))
                alone = alone or made
        return proofs

    def _other(self, weights: Weights, float32: Sequence[Continuation]) -> WeightsFound | None:
        from common.engine.text_scores import score_text

        _say(f"{weights}")
        try:
            watched = self._load(weights)
        except ModelError as error:
            _say(f"{weights}: not compared: {error}")
            return None
        made = continuations(watched, self._material.prompts, new_tokens=self._new_tokens, batch=MOST, chunk=None)
        scores = score_text(self._reference, watched, self._material.text)
        return WeightsFound(name=weights, scores=scores, agreement=agreement(made, float32))

    def _prove(
        self, way: str, made: Sequence[Continuation], first: Sequence[Continuation], *, seconds: float, comparable_bits: bool
    ) -> Proof:
        shortfalls = [self._shortfall(place, answer.tokens) for place, answer in enumerate(made)]
        return prove(way, made, first, shortfalls, seconds=seconds, comparable_bits=comparable_bits)

    def _shortfall(self, place: int, answer: tuple[int, ...]) -> list[float]:
        """Asked once for each answer that differs: the reference costs more than the answer."""
        key = (place, answer)
        if key not in self._shortfalls:
            self._shortfalls[key] = self._reference.shortfalls(self._material.prompts[place], answer)
        return self._shortfalls[key]

    def _load(self, weights: Weights) -> "WatchedModel":
        """Over memory that is there until the next is loaded."""
        variant = Variant(forward=self._forward, weights=weights)
        layout = kv_layout(self._folder.config(), variant.dtype, BLOCK_SIZE)
        self._pool = KvPool(layout, self._blocks(layout))
        return self._load_into(weights, layout, self._pool.region)

    def _load_into(self, weights: Weights, layout: KvLayout, region: KvRegion) -> "WatchedModel":
        variant = Variant(forward=self._forward, weights=weights)
        watched = load_watched(self._folder, variant, layout, region)
        watched.executor.prepare_thread(self._threads)
        return watched

    def _blocks(self, layout: KvLayout) -> int:
        """For MOST of the longest answers, or the text."""
        each = layout.blocks_for(max(map(len, self._material.prompts)) + self._new_tokens + 1) + 1
        return max(MOST * each, layout.blocks_for(len(self._material.text)))


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
