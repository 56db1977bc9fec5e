"""Where a step's time goes: `python -m tests.benchmarks.step_profile`, for the shares that `segue bench-engine` reports.

Each part of a step (products by matrix, attention, norms, rotation, gate) is run alone over all the layers of the real model, at the
step's own shapes and with the layers' own weights, so that memory is read as it is in a step; its share of the machine's limit
stands beside it. Parts and the whole step take turns, medians count. What the parts do not add up to is the embedding, KV
writes, metadata and what parts cost each other in caches. One thread; pin it: `taskset -c 0 python -m tests.benchmarks.step_profile`.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from common.engine.kv_cache_view import KvCacheView
from common.engine.load_model import load_model
from common.engine.machine_peaks import MachinePeaks
from common.engine.model_cache import default_cache_dir
from common.engine.model_files import ModelFolder
from common.engine.model_source import ModelSpec, resolve_model
from common.engine.native.library import (
    SEQUENCE_DTYPE,
    AttentionStruct,
    LayerStruct,
    NativeEngine,
    NativeLibrary,
    cache_struct,
    load_library,
)
from common.engine.native.llama_model import LlamaModel
from common.engine.native.native_forward import NativeForward
from common.engine.paged_batch import BatchRow
from common.engine.quantized_weights import stored_weights
from common.values.kv_layout import KvDtype
from tools.engine_variants import KvPool, kv_pool

ROUNDS = 7
BLOCK_SIZE = 16
VARIANTS = ("float32", "bfloat16", "gguf")
Run = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """`rows` sequences, of which each has `count` new positions after `past`."""

    name: str
    rows: int
    count: int
    past: int

    @property
    def tokens(self) -> int:
        return self.rows * self.count

    @property
    def pairs(self) -> int:
        """(query, key) pairs that attention looks at."""
        return self.rows * sum(self.past + i + 1 for i in range(self.count))


SHAPES = (
    Shape(name="prefill 512", rows=1, count=512, past=0),
    Shape(name="decode b1 c512", rows=1, count=1, past=511),
    Shape(name="decode b16 c512", rows=16, count=1, past=511),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """`limit_s` is the least that this machine could take for it."""

    name: str
    run: Run
    limit_s: float


class Profile:
    """One kind of weights of one model, taken apart."""

    def __init__(self, folder: ModelFolder, weights: str, library: NativeLibrary, pool: KvPool) -> None:
        dtype = cast("KvDtype", "float32" if weights == "gguf" else weights)
        model = load_model(folder, dtype=dtype)
        sources = stored_weights(model, folder.quantized()) if weights == "gguf" else {}
        self.weights = weights
        self._model = LlamaModel(library, model, consume=True, quantized=sources)
        self._library = library
        self._engine = NativeEngine(library)
        self._forward = NativeForward(library, self._model)
        self._pool = pool
        self._cache = KvCacheView.over_region(
            layout=pool.layout, address=pool.region.blocks_address, blocks=pool.region.blocks, device="cpu"
        )
        self._item_bits = {"float32": 32.0, "bfloat16": 16.0, "gguf": 5.0}[weights]

    def parts(self, shape: Shape, peak: float, read: float) -> list[Part]:
        """The whole step first."""
        m = self._model.struct
        queries = m.heads * m.head_dim
        width = queries + 2 * m.kv_heads * m.head_dim
        kept = shape.rows
        products = (("qkv", m.hidden, width), ("output", queries, m.hidden), ("gate_up", m.hidden, 2 * m.intermediate),
                    ("down", m.intermediate, m.hidden))  # fmt: skip
        found = [Part(name="whole step", run=self._whole(shape), limit_s=0.0)]
        for name, inputs, outputs in products:
            limit = m.layers * self._product_limit_s(shape.tokens, inputs, outputs, peak, read)
            found.append(Part(name=name, run=self._products(name, shape.tokens, inputs, outputs), limit_s=limit))
        head = self._product_limit_s(kept, m.hidden, self._model.logits_size, peak, read)
        found.append(Part(name="head", run=self._head(kept), limit_s=head))
        operations = 4.0 * shape.pairs * queries * m.layers
        kv_bytes = 2.0 * shape.rows * (shape.past + shape.count) * m.kv_heads * m.head_dim * self._pool.layout.item_bytes * m.layers
        found.append(Part(name="attention", run=self._attention(shape), limit_s=max(operations / peak, kv_bytes / read)))
        return found + self._small(shape.tokens)

    def _product_limit_s(self, rows: int, inputs: int, outputs: int, peak: float, read: float) -> float:
        return max(2.0 * rows * inputs * outputs / peak, inputs * outputs * self._item_bits / 8.0 / read)

    def _whole(self, shape: Shape) -> Run:
        each = -(-(shape.past + shape.count) // BLOCK_SIZE)
        rows = [
            BatchRow(
                tokens=[17 + i % 1000 for i in range(shape.count)],
                start=shape.past,
                blocks=tuple(range(row * each, (row + 1) * each)),
                kept=(shape.count - 1,),
            )
            for row in range(shape.rows)
        ]
        return lambda: self._forward.logits(self._cache, rows)

    def _products(self, name: str, rows: int, inputs: int, outputs: int) -> Run:
        x, y = np.ones((rows, inputs), dtype=np.float32), np.empty((rows, outputs), dtype=np.float32)
        layers: Sequence[LayerStruct] = self._model.struct.layer[: self._model.struct.layers]
        addresses = [int(getattr(layer, name)) for layer in layers]

        def run() -> None:
            for address in addresses:
                self._multiply(x, address, y)

        return run

    def _head(self, rows: int) -> Run:
        m = self._model.struct
        x, y = np.ones((rows, m.hidden), dtype=np.float32), np.empty((rows, self._model.logits_size), dtype=np.float32)
        return lambda: self._multiply(x, m.head, y)

    def _multiply(
        self, x: np.ndarray[tuple[int, int], np.dtype[np.float32]], address: int, y: np.ndarray[tuple[int, int], np.dtype[np.float32]]
    ) -> None:
        self._library.functions.segue_gemm(
            self._engine.address, x.ctypes.data, x.shape[1], address, y.ctypes.data, y.shape[1], len(x), None
        )

    def _attention(self, shape: Shape) -> Run:
        m = self._model.struct
        each = -(-(shape.past + shape.count) // BLOCK_SIZE)
        tables = np.arange(shape.rows * each, dtype=np.int32).reshape(shape.rows, each)
        sequences = np.empty(shape.rows, dtype=SEQUENCE_DTYPE)
        sequences["first"] = np.arange(shape.rows) * shape.count
        sequences["start"], sequences["count"] = shape.past, shape.count
        sequences["table"] = [tables[row].ctypes.data for row in range(shape.rows)]
        queries = np.full((shape.tokens, m.heads * m.head_dim), 0.1, dtype=np.float32)
        out = np.empty_like(queries)
        cache = cache_struct(self._pool.layout, self._pool.region.blocks_address)
        layers = [
            AttentionStruct(
                queries=queries.ctypes.data, query_stride=queries.shape[1], out=out.ctypes.data, out_stride=out.shape[1],
                heads=m.heads, kv_heads=m.kv_heads, head_dim=m.head_dim, layer=layer, scale=m.scale, softcap=0.0, window=0, sinks=None,
            )
            for layer in range(m.layers)
        ]  # fmt: skip

        def run() -> object:
            for layer in layers:
                self._engine.attention(cache, layer, sequences)
            return tables, out  # kept until here: the structures hold addresses

        return run

    def _small(self, tokens: int) -> list[Part]:
        """What computes little: its limit is counted as nothing."""
        m, functions = self._model.struct, self._library.functions
        hidden, normed = np.ones((tokens, m.hidden), dtype=np.float32), np.empty((tokens, m.hidden), dtype=np.float32)
        wide = np.ones((tokens, 2 * m.intermediate), dtype=np.float32)
        gated = np.empty((tokens, m.intermediate), dtype=np.float32)
        heads, half = tokens * (m.heads + m.kv_heads), m.head_dim // 2
        turned = np.ones((heads, m.head_dim), dtype=np.float32)
        angles = np.full((heads, half), 0.5, dtype=np.float32)

        def norms() -> None:
            for _ in range(2 * m.layers + 1):
                functions.segue_norm(hidden.ctypes.data, m.final_norm, normed.ctypes.data, tokens, m.hidden, m.epsilon)

        def rotations() -> None:
            for _ in range(m.layers):
                functions.segue_rotate(turned.ctypes.data, angles.ctypes.data, angles.ctypes.data, heads, half)

        def gates() -> None:
            for _ in range(m.layers):
                functions.segue_gate(wide.ctypes.data, gated.ctypes.data, tokens, m.intermediate)

        runs = (("norms", norms), ("rotation", rotations), ("gate", gates))
        return [Part(name=name, run=run, limit_s=0.0) for name, run in runs]


def show(profile: Profile, shape: Shape, peak: float, read: float) -> None:
    parts = profile.parts(shape, peak, read)
    times: dict[str, list[float]] = {part.name: [] for part in parts}
    for _ in range(ROUNDS + 1):
        for part in parts:
            began = time.process_time()
            part.run()
            times[part.name].append(time.process_time() - began)
    medians = {name: statistics.median(samples[1:]) for name, samples in times.items()}
    whole = medians.pop("whole step")
    print(f"\n{shape.name}, {profile.weights}: {whole * 1e3:.2f} ms")
    print("| part | ms | of the step | its limit, ms | of its limit |\n| --- | --- | --- | --- | --- |")
    for part in parts[1:]:
        took = medians[part.name]
        limit = (f"{part.limit_s * 1e3:.2f}", f"{part.limit_s / took:.0%}") if part.limit_s else ("", "")
        print(f"| {part.name} | {took * 1e3:.2f} | {took / whole:.0%} | {limit[0]} | {limit[1]} |")
    rest = whole - sum(medians.values())
    print(f"| the rest | {rest * 1e3:.2f} | {rest / whole:.0%} | | |", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    library = load_library(os.environ)
    if library is None:
        raise SystemExit("there are no kernels of our own here")
    folder = resolve_model(ModelSpec(model=None, load_format="auto"), default_cache_dir(os.environ))
    machine = MachinePeaks(os.environ, time.process_time)
    read = statistics.median(machine.read_bytes_per_s() for _ in range(5))
    loops = {loop.dtype: loop for loop in machine.loops}
    blocks = max(shape.rows * -(-(shape.past + shape.count) // BLOCK_SIZE) for shape in SHAPES)
    for weights in VARIANTS:
        dtype: KvDtype = "bfloat16" if weights == "bfloat16" else "float32"
        if dtype not in loops:
            print(f"{weights}: not run, this CPU does not multiply it")
            continue
        peak = statistics.median(machine.operations_per_s(loops[dtype]) for _ in range(3))
        print(f"\n{weights}: {peak / 1e9:.0f} GFLOP/s in registers, {read / 1e9:.1f} GB/s read")
        profile = Profile(folder, weights, library, kv_pool(folder, dtype, block_size=BLOCK_SIZE, blocks=blocks))
        for shape in SHAPES:
            show(profile, shape, peak, read)


if __name__ == "__main__":
    main()
