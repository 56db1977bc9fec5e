"""vLLM and llama.cpp beside our own engine, where they are installed: as subjects whose work is done by child processes.

The children inherit the cores to which this process is pinned. vLLM's stays for all visits; llama.cpp's programs are started
anew for each, repeat within it what they measure, and are therefore visited once.
"""

import contextlib
import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from common.engine.model_files import ModelFolder
from common.engine.quantized_file import QUANTIZED_FILE
from common.values.errors import SegueError
from tools.bench_engine_subject import DecodeCase, PrefillCase, first_length

_VLLM_PROGRAM = Path(__file__).with_name("bench_engine_vllm.py")
_LLAMA_REPEATS = 3
_LLAMA_MICRO_BATCH = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A peer that is not measured, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """`python` is the interpreter of an environment that has vLLM."""

    python: str
    cores: tuple[int, ...]
    clock: Literal["wall", "cpu"]
    max_model_len: int
    max_num_seqs: int
    log: Path


class _Answer(msgspec.Struct):
    ready: bool = False
    seconds: list[float] = []


class VllmSubject:
    """A process that holds vLLM's engine and answers a request a line. Its start compiles the model, which takes a minute or two."""

    def __init__(self, model: Path, weights: str, options: VllmOptions, *, dummy: bool) -> None:
        self.name = "vLLM"
        self.weights = weights
        self.kv_item_bytes = 4 if weights == "float32" else 2
        self.visits: int | None = None
        self._log = options.log
        command = [options.python, str(_VLLM_PROGRAM), "--model", str(model), "--dtype", weights, "--clock", options.clock]
        command += ["--cores", ",".join(map(str, options.cores)), *(["--dummy"] if dummy else [])]
        command += ["--max-model-len", str(options.max_model_len), "--max-num-seqs", str(options.max_num_seqs)]
        with open(options.log, "ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def prefill_s(self, case: PrefillCase) -> list[float]:
        return self._ask({"kind": "prefill", "tokens": case.tokens})

    def decode_s(self, case: DecodeCase, *, steps: int) -> list[float]:
        """Its requests bring their prompt alone, so a row's first token is made before the unmeasured step."""
        length = max(1, first_length(case, steps=steps) - 1)
        return self._ask({"kind": "decode", "batch": case.batch, "length": length, "steps": steps})

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, request: dict[str, str | int]) -> list[float]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise SegueError(f"vLLM ended: see {self._log}") from error
        return self._answer().seconds

    def _answer(self) -> _Answer:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SegueError(f"vLLM ended: see {self._log}")
        return msgspec.json.decode(line, type=_Answer)


class _LlamaBench(msgspec.Struct):
    samples_ns: list[int]


class _LlamaBatchedBench(msgspec.Struct):
    t_tg: float


class LlamaSubject:
    """llama-bench for prompts and single rows, llama-batched-bench for batches. `model` is a GGUF file of these weights."""

    def __init__(self, folder: Path, model: Path, weights: str, *, threads: int, clock: str) -> None:
        self.name = "llama.cpp" if clock == "wall" else "llama.cpp, in wall time"  # it reports no other
        self.weights = weights
        self.kv_item_bytes = 2  # its cache is float16 unless asked otherwise
        self.visits: int | None = 1
        self._folder = folder
        self._common = ("-m", str(model), "-t", str(threads), "-ub", str(_LLAMA_MICRO_BATCH))

    def prefill_s(self, case: PrefillCase) -> list[float]:
        return self._bench(("-p", str(case.tokens), "-n", "0"))

    def decode_s(self, case: DecodeCase, *, steps: int) -> list[float]:
        depth = first_length(case, steps=steps)
        if case.batch == 1:
            return [took / steps for took in self._bench(("-p", "0", "-n", str(steps), "-d", str(depth)))]
        rows = ("-npp", str(depth), "-ntg", str(steps), "-npl", str(case.batch), "-c", str(case.batch * (depth + steps)))
        out = self._run("llama-batched-bench", (*rows, "--output-format", "jsonl"))
        lines = [line for line in out.splitlines() if line.startswith("{") and '"t_tg"' in line]
        return [msgspec.json.decode(line, type=_LlamaBatchedBench).t_tg / steps for line in lines]

    def close(self) -> None:
        """Each program ends by itself."""

    def _bench(self, arguments: Sequence[str]) -> list[float]:
        out = self._run("llama-bench", (*arguments, "-r", str(_LLAMA_REPEATS), "-o", "json"))
        return [sample / 1e9 for run in msgspec.json.decode(out, type=list[_LlamaBench]) for sample in run.samples_ns]

    def _run(self, program: str, arguments: Sequence[str]) -> str:
        done = subprocess.run([str(self._folder / program), *self._common, *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SegueError(f"{program} failed: {done.stderr.strip()[-300:]}")
        return done.stdout


def find_vllm(python: str | None) -> str | Missing:
    """The interpreter, if there is one and it has vLLM."""
    if python is None:
        return Missing(name="vLLM", reason="not installed (--vllm-python names the Python of an environment that has it)")
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        has_it = subprocess.run([python, "-c", probe], capture_output=True, check=False).returncode == 0
    except OSError as error:
        return Missing(name="vLLM", reason=f"not installed: {python}: {error.strerror}")
    return python if has_it else Missing(name="vLLM", reason=f"not installed: {python} has no vllm")


def without_blocks(folder: ModelFolder, links: Path) -> Path:
    """The model's folder as vLLM can load it: it takes every safetensors file for weights, our quantised matrices too."""
    if not (folder.path / QUANTIZED_FILE).exists():
        return folder.path
    links.mkdir()
    for path in folder.path.iterdir():
        if path.name != QUANTIZED_FILE:
            (links / path.name).symlink_to(path.resolve())
    return links


def find_llama(folder: str | None) -> Path | Missing:
    """The folder of llama.cpp's programs: the one named, else that of the llama-bench on PATH."""
    found = shutil.which("llama-bench", path=folder)
    if found is None:
        where = f"no llama-bench in {folder}" if folder is not None else "--llama names the folder of llama-bench"
        return Missing(name="llama.cpp", reason=f"not installed ({where})")
    return Path(found).parent
