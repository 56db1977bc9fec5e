"""What `--dtype auto` takes for a model on this host: what is quickest for its weights here, measured once and remembered.

Keys and values have the dtype of the products. Only where our kernels compute a model whose shapes they know, on a CPU that
multiplies bfloat16, is there anything to measure; everywhere else the exact float32 is taken (bfloat16 on a GPU). Weights that
came in blocks stay so in float32; in bfloat16 they would be expanded. Activations are never quantised.
"""

import contextlib
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import xxhash

from common.engine.dtype_choice import DtypeChoice, DtypeTrial, choose_by_trials
from common.engine.model_cache import host_lock, make_folder
from common.engine.model_files import ModelFolder
from common.engine.native.dtype_trial import Candidate, try_dtypes
from common.engine.native.library import NativeLibrary
from common.engine.native.llama_family import FAMILY
from common.engine.quantization_choice import Quantization, kind_for, rounds
from common.engine.quantized_matrix import BlockKind

_CPU_INFO: Final = Path("/proc/cpuinfo")
_CPU_FIELDS: Final = ("vendor_id", "cpu family", "model", "model name", "stepping", "cache size", "flags")
_BF16_VARIANT: Final = "avx512bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class DtypeQuestion:
    """A model and how it will be computed. `library` None: by torch alone."""

    folder: ModelFolder
    device: str
    quantization: Quantization
    library: NativeLibrary | None


def auto_dtype(question: DtypeQuestion, cache_dir: Path, *, cpu_info: Path = _CPU_INFO) -> DtypeChoice:
    """Blocking: measures for a second or two, the first time on this host. Two workers that start together measure once."""
    if (known := _known(question)) is not None:
        return known
    assert question.library is not None
    candidates = _candidates(question)
    path = make_folder(cache_dir / "dtype") / f"{_digest(question, question.library, candidates, cpu_info)}.json"
    with host_lock(cache_dir, f"dtype-{path.stem}", waiting=lambda: None):
        trials = _remembered(path)
        if trials is None:
            trials = try_dtypes(question.library, question.folder.config(), candidates)
            _remember(path, trials)
    return choose_by_trials(trials)


def _known(question: DtypeQuestion) -> DtypeChoice | None:
    """The choice where there is nothing to measure."""
    if question.device != "cpu":
        return DtypeChoice(dtype="bfloat16", reason="it is a GPU")
    if question.library is None:
        return DtypeChoice(
            dtype="float32", reason="there are no own kernels here, and torch's results depend on the batch in bfloat16"
        )
    if question.library.variant != _BF16_VARIANT:
        return DtypeChoice(dtype="float32", reason=f"this CPU does not multiply bfloat16 (kernels: {question.library.variant})")
    architecture = question.folder.config().architecture
    if architecture not in FAMILY:
        return DtypeChoice(dtype="float32", reason=f"{architecture} is not computed by our own layers")
    return None


def _candidates(question: DtypeQuestion) -> list[Candidate]:
    """float32 first. Blocks that a model came with serve in float32 alone; rounded weights are the same for both."""
    if rounds(question.quantization):
        kind = kind_for(question.quantization, end=False)
        return [Candidate(dtype="float32", kind=kind), Candidate(dtype="bfloat16", kind=kind)]
    kinds: Counter[BlockKind] = Counter()
    if question.quantization == "auto":
        kinds.update(matrix.kind for matrix in question.folder.quantized().values())
    commonest = kinds.most_common(1)[0][0] if kinds else None
    return [Candidate(dtype="float32", kind=commonest), Candidate(dtype="bfloat16")]


def _digest(question: DtypeQuestion, library: NativeLibrary, candidates: list[Candidate], cpu_info: Path) -> str:
    """Of all that the figures depend on: the CPU, the build of the kernels, the model's shapes, the candidates."""
    parts = (_cpu(cpu_info), str(library.path), repr(question.folder.config()), repr(candidates))
    return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())


def _cpu(cpu_info: Path) -> str:
    fields: dict[str, str] = {}
    for line in cpu_info.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    return "\n".join(fields.get(name, "") for name in _CPU_FIELDS)


def _remembered(path: Path) -> list[DtypeTrial] | None:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return [DtypeTrial(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))] or None
    return None


def _remember(path: Path, trials: list[DtypeTrial]) -> None:
    partial = path.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time at the next start, nothing else
        partial.write_text(json.dumps([asdict(trial) for trial in trials]), encoding="utf-8")
        partial.rename(path)
