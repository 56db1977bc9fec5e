"""vLLM under the same measurements: run by vLLM's own Python, it answers one line of JSON a request line.

Started by bench_engine_peers.py, in an environment that has vLLM and not Segue: so it imports nothing of this project. The engine runs
in this process, step by step. Prompts for prefill are new each time. Those for decode are always the same, so that vLLM's prefix
cache has them after the first visit, and a visit consists of decode steps.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Protocol, cast

VOCABULARY = 20_000
READY = "ready"


class Engine(Protocol):
    """What is used of vLLM's LLMEngine."""

    def add_request(self, request_id: str, prompt: object, params: object) -> object: ...
    def step(self) -> list[object]: ...
    def has_unfinished_requests(self) -> bool: ...
    def abort_request(self, request_ids: list[str]) -> object: ...


def main() -> int:
    options = _parse()
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE=str(options.kv_gib),
        VLLM_CPU_OMP_THREADS_BIND=options.cores,
        VLLM_CPU_NUM_OF_RESERVED_CPU="0",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
        DO_NOT_TRACK="1",
    )
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # vLLM prints
    measured = Measured(options)
    _say(answers.write, {READY: True})
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        if request["kind"] == "prefill":
            seconds = [measured.prefill_s(request["tokens"])]
        else:
            seconds = measured.decode_s(request["batch"], request["length"], request["steps"])
        _say(answers.write, {"seconds": seconds})
        answers.flush()
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--cores", required=True)
    parser.add_argument("--clock", choices=("wall", "cpu"), required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--max-num-seqs", type=int, required=True)
    parser.add_argument("--dummy", action="store_true")
    parser.add_argument("--kv-gib", type=int, default=2)
    return parser.parse_args()


def _say(write: Callable[[str], object], answer: dict[str, object]) -> None:
    write(json.dumps(answer) + "\n")


class Measured:
    """One engine, with greedy sampling, whole prompts in one step, and the defaults otherwise."""

    def __init__(self, options: argparse.Namespace) -> None:
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found,unused-ignore]

        llm = LLM(
            model=options.model,
            dtype=options.dtype,
            skip_tokenizer_init=True,
            max_model_len=options.max_model_len,
            max_num_batched_tokens=max(2048, options.max_model_len),
            max_num_seqs=options.max_num_seqs,
            enable_prefix_caching=True,
            load_format="dummy" if options.dummy else "auto",
            disable_log_stats=True,
        )
        self._engine = cast("Engine", llm.llm_engine)
        self._sampling = SamplingParams
        self._clock = time.process_time if options.clock == "cpu" else time.perf_counter
        self._random = random.Random(5)
        self._requests = 0

    def prefill_s(self, tokens: int) -> float:
        self._add(self._random.choices(range(VOCABULARY), k=tokens), new_tokens=1)
        began = self._clock()
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return self._clock() - began

    def decode_s(self, batch: int, length: int, steps: int) -> list[float]:
        """Steps until all rows have made a token, one unmeasured, then `steps` measured ones."""
        names = [self._add(_prompt(row, length), new_tokens=steps + 64) for row in range(batch)]
        made: dict[str, int] = {}
        while len(made) < batch:
            self._count(made)
        self._count(made)
        times = []
        for _ in range(steps):
            began = self._clock()
            rows = len(self._engine.step())
            times.append(self._clock() - began)
            if rows != batch:
                raise RuntimeError(f"a step of {rows} rows, not {batch}")
        self._engine.abort_request(names)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return times

    def _count(self, made: dict[str, int]) -> None:
        for output in self._engine.step():
            name = str(output.request_id)  # type: ignore[attr-defined]
            made[name] = made.get(name, 0) + 1

    def _add(self, tokens: list[int], *, new_tokens: int) -> str:
        self._requests += 1
        name = f"bench-{self._requests}"
        params = self._sampling(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request(name, {"prompt_token_ids": tokens}, params)
        return name


def _prompt(row: int, length: int) -> list[int]:
    """The prompt of a row is the beginning of the same row's longer prompts."""
    return random.Random(1_000 + row).choices(range(VOCABULARY), k=length)


if __name__ == "__main__":
    sys.exit(main())
