"""Workers that are started with damaged model files refuse, each with one clear line, and the mesh serves on."""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tests.faults.fault import Act, Fault
from tests.faults.fault_mesh import FaultMesh
from tests.faults.member import ROOT
from tests.tiny_models import tiny_llama_gguf, write_folder

GROUP = "damaged model files"
REFUSED_WITHIN_S = 60


def model_file_faults() -> list[Fault]:
    return [
        Fault(name="a GGUF file cut off in its tensors", group=GROUP, inject=_refused(_cut_gguf)),
        Fault(name="a GGUF file cut off in its header", group=GROUP, inject=_refused(_cut_gguf_header)),
        Fault(name="a safetensors file cut off", group=GROUP, inject=_refused(_cut_safetensors)),
        Fault(name="tensors of the wrong size", group=GROUP, inject=_refused(_wrong_sizes)),
    ]


def _cut_gguf(folder: Path) -> Path:
    return _cut(tiny_llama_gguf(folder / "damaged.gguf"), 0.8)


def _cut_gguf_header(folder: Path) -> Path:
    return _cut(tiny_llama_gguf(folder / "damaged.gguf"), 0.02)


def _cut_safetensors(folder: Path) -> Path:
    path = write_folder(folder / "damaged")
    _cut(path / "model.safetensors", 0.5)
    return path


def _wrong_sizes(folder: Path) -> Path:
    """A whole tiny Llama, but for one matrix that is a column short."""
    layer = {
        **dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), (64, 64)),
        **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (32, 64)),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (96, 64)),
        **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (64,)),
        "mlp.down_proj": (64, 96),
    }
    shapes = {f"model.layers.{number}.{name}.weight": shape for number in range(2) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (300, 64), "lm_head.weight": (300, 64), "model.norm.weight": (64,)}
    shapes["model.layers.1.mlp.down_proj.weight"] = (64, 95)
    return write_folder(folder / "damaged", tensors={name: np.ones(shape, dtype=np.float32) for name, shape in shapes.items()})


def _cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def _refused(make: Callable[[Path], Path]) -> Act:
    async def start(mesh: FaultMesh) -> Sequence[str]:
        folder = mesh.folder / make.__name__
        folder.mkdir()
        path = make(folder)
        flags = mesh.worker_flags[: mesh.worker_flags.index("--engine")]
        command = [
            sys.executable,
            "-m",
            "services.decode",
            "--worker-id",
            "damaged",
            *flags,
            "--model",
            str(path),
            "--dtype",
            "float32",
        ]
        ended = await asyncio.to_thread(_run, command)
        if ended is None:
            return (f"a worker with {path.name} did not end",)
        lines = ended.stderr.decode(errors="replace").strip().splitlines()
        if ended.returncode == 0 or "Traceback" in ended.stderr.decode(errors="replace") or "damaged" not in " ".join(lines[-2:]):
            return (f"status {ended.returncode}: {' | '.join(lines[-3:])}",)
        return ()

    return start


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[bytes] | None:
    try:
        return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, timeout=REFUSED_WITHIN_S, check=False)
    except subprocess.TimeoutExpired:
        return None
