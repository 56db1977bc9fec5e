"""What `bench-engine` was asked to measure. Loads nothing heavy: its help should come at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

FORWARDS = ("torch", "native")
FLOATS = ("float32", "bfloat16", "float16")
WEIGHTS = (*FLOATS, "gguf", "int8", "int4")
DEFAULT_WEIGHTS = ("float32", "bfloat16", "gguf", "int8", "int4")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """The flags of the command, by their names. `forwards` None: all that work here; `threads` None: one on each core."""

    model: str | None = None
    load_format: Literal["auto", "dummy"] = "auto"
    cores: tuple[int, ...] = (0,)
    threads: int | None = None
    forwards: tuple[str, ...] | None = None
    weights: tuple[str, ...] = DEFAULT_WEIGHTS
    prefill: tuple[int, ...] = (128, 512, 1024)
    batches: tuple[int, ...] = (1, 4, 16, 32)
    contexts: tuple[int, ...] = (256, 512)
    max_num_batched_tokens: int | None = None
    rounds: int = 5
    steps: int = 5
    clock: Literal["wall", "cpu"] = "wall"
    vllm_python: str | None = None
    llama: str | None = None
    llama_model: tuple[tuple[str, Path], ...] = ()

    @property
    def thread_count(self) -> int:
        return self.threads or len(self.cores)

    def problem(self, cores_here: frozenset[int]) -> str | None:
        """Which flag is wrong, and what it takes."""
        if not self.cores or not cores_here.issuperset(self.cores):
            return f"--cores takes cores out of {sorted(cores_here)}"
        if unknown := set(self.forwards or ()) - set(FORWARDS):
            return f"--forwards takes {', '.join(FORWARDS)}, not {', '.join(sorted(unknown))}"
        if unknown := set(self.weights) - set(WEIGHTS):
            return f"--weights takes {', '.join(WEIGHTS)}, not {', '.join(sorted(unknown))}"
        counts = {"rounds": (self.rounds,), "steps": (self.steps,), "prefill": self.prefill, "batches": self.batches}
        counts |= {"contexts": self.contexts, "max-num-batched-tokens": (self.max_num_batched_tokens or 1,)}
        counts |= {"threads": (1 if self.threads is None else self.threads,)}
        wrong = [name for name, numbers in counts.items() if any(number < 1 for number in numbers)]
        return f"--{wrong[0]} must be at least 1" if wrong else None
