"""What a decode step costs beside its model: `python -m tests.benchmarks.step_overhead`.

A model so small that its forward takes microseconds stands behind the real executor and the real step thread, with SmolLM2's 49,152
tokens to draw from or with few, and block tables as long as those of 4,096 tokens. With few tokens nearly all that a step takes is
overhead: checks, metadata, the call, drawing, results, and the way through the thread. With many, the head's product and the drawing
come on top. The least of several runs counts, in ms a step, by CPU time of the process.
"""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from common.engine.executor import Executor
from common.engine.native.library import load_library
from common.engine.step_thread import StepThread
from common.engine.torch_step import build_torch_executor
from common.values.step import StepPlan
from tests.step_engines import LAYOUT, Memory, chunk, random_model, started

STEPS = 60
RUNS = 7
CONTEXT = 40
BLOCKS_A_ROW = 256
VOCABULARIES = (300, 49_152)
WAYS: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "top-p 0.9": {"temperature": 1.0, "top_p": 0.9}}


def model_of(vocabulary: int) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192,
    )  # fmt: skip
    return random_model(config)


class Decoding:
    """Sequences that have had their prompt, and the plans of their next steps."""

    def __init__(self, executor: Executor, rows: int, sampling: dict[str, Any]) -> None:
        self.rows = rows
        self._tables = [tuple(range(row * BLOCKS_A_ROW, (row + 1) * BLOCKS_A_ROW)) for row in range(rows)]
        self._length = CONTEXT
        self._number = 1
        prompt = [5 + i for i in range(CONTEXT)]
        starts = [started(row, prompt, max_tokens=8000, **sampling) for row in range(rows)]
        plan = [chunk(row, 0, CONTEXT, self._tables[row]) for row in range(rows)]
        executor.execute(StepPlan(number=1, rows=tuple(plan), starts=tuple(starts), ends=tuple(range(rows))))

    def plan(self) -> StepPlan:
        self._number += 1
        rows = tuple(chunk(row, self._length, 1, list(table)) for row, table in enumerate(self._tables))
        self._length += 1
        return StepPlan(number=self._number, rows=rows)

    def plans(self) -> list[StepPlan]:
        return [self.plan() for _ in range(STEPS)]


def least_ms(executor: Executor, rows: int, sampling: dict[str, Any], run: Callable[[Executor, Sequence[StepPlan]], None]) -> float:
    times = []
    for _ in range(RUNS):
        plans = Decoding(executor, rows, sampling).plans()
        began = time.process_time()
        run(executor, plans)
        times.append((time.process_time() - began) / STEPS)
    return min(times) * 1e3


def through_executor(executor: Executor, plans: Sequence[StepPlan]) -> None:
    for plan in plans:
        assert all(row.fault is None for row in executor.execute(plan).rows)


async def _through_thread(executor: Executor, plans: Sequence[StepPlan]) -> None:
    """Two steps outstanding, as a worker keeps them."""
    thread = StepThread(executor)
    ahead = thread.submit(plans[0])
    for plan in plans[1:]:
        ticket = thread.submit(plan)
        await thread.result(ahead)
        ahead = ticket
    await thread.result(ahead)
    await thread.close()


def through_thread(executor: Executor, plans: Sequence[StepPlan]) -> None:
    asyncio.run(_through_thread(executor, plans))


def main() -> None:
    library = load_library(os.environ)
    kernels = "torch" if library is None else library.kernels
    print(f"kernels {kernels}; ms of CPU a step, the least of {RUNS} runs of {STEPS} steps")
    print(f"{'tokens to draw from':>20} {'rows':>5} {'how':>10} {'executor':>9} {'with thread':>12}")
    for vocabulary in VOCABULARIES:
        for rows in (1, 16):
            for how, sampling in WAYS.items():
                memory = Memory(blocks=rows * BLOCKS_A_ROW)
                model = model_of(vocabulary)
                executor = build_torch_executor(
                    model, LAYOUT, memory.blocks_address, memory.blocks, "cpu", check=False, library=library
                )
                executor.prepare_thread(1)
                alone, threaded = (least_ms(executor, rows, sampling, run) for run in (through_executor, through_thread))
                print(f"{vocabulary:>20,} {rows:>5} {how:>10} {alone:>9.3f} {threaded:>12.3f}", flush=True)


if __name__ == "__main__":
    main()
