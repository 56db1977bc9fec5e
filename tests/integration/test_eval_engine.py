"""`segue eval-engine` run as its user runs it, and the reference that it holds everything against."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from common.adapters.kv_region import AnonymousMemory, create_region, region_size
from common.engine.load_model import load_model
from common.engine.model_files import ModelFolder
from common.engine.model_source import ModelSpec, resolve_model
from common.engine.native.library import NativeLibrary
from common.engine.paged_attention import PAGED_ATTENTION, register_paged_attention
from common.engine.quantization_choice import Quantization
from common.engine.reference_model import ReferenceModel
from common.engine.text_scores import score_text
from common.engine.watched_forward import WatchedModel
from common.values.kv_layout import KvLayout
from tests.native_kernels import best_library
from tests.tiny_models import LLAMA_CONFIG, tiny_llama_gguf

ROOT = Path(__file__).resolve().parents[2]
LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=16, block_size=16)
TEXT = [(7919 * (place + 1)) % 300 for place in range(600)]


def evaluate(folder: Path, *arguments: str) -> dict[str, Any]:
    answers = folder / "answers.json"
    command = [sys.executable, "-m", "tools.command", "eval-engine", *arguments, "--json", str(answers)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stderr
    report: dict[str, Any] = json.loads(answers.read_text())
    return report


def assert_proven(report: dict[str, Any], answers: int, *, bits: bool) -> None:
    assert len(report["proofs"]) == 6
    for proof in report["proofs"]:
        assert (proof["answers"], proof["wrong"]) == (answers, 0), proof["way"]
        if bits:
            assert proof["same_tokens"], proof["way"]
            assert proof["same_bits"] in (True, None), proof["way"]


def test_every_way_gives_the_models_tokens_and_a_quantised_model_its_expansions_bits(tmp_path: Path) -> None:
    best_library()  # or skip
    model = tiny_llama_gguf(tmp_path / "tiny.gguf")
    report = evaluate(tmp_path, str(model), "--prompts", "20", "--tokens", "7", "--weights", "gguf,bfloat16,int4")
    assert_proven(report, 20, bits=True)
    assert min(report["prompt_lengths"]) < 10 < 100 < max(report["prompt_lengths"])
    found = {one["name"]: one for one in report["weights"]}
    assert found["gguf"]["agreement"]["same_bits"]
    assert found["gguf"]["scores"]["perplexity"] == pytest.approx(found["gguf"]["scores"]["reference_perplexity"], rel=1e-5)
    for name in ("bfloat16", "int4"):
        assert not found[name]["agreement"]["same_bits"]
        assert found[name]["scores"]["divergence"] > found["gguf"]["scores"]["divergence"]


def test_transformers_modules_give_the_models_tokens_too(tmp_path: Path) -> None:
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(LLAMA_CONFIG), encoding="utf-8")
    arguments = ("--load-format", "dummy", "--forward", "torch", "--prompts", "6", "--tokens", "5", "--weights", "bfloat16")
    assert_proven(evaluate(tmp_path, str(config), *arguments), 6, bits=False)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_real_model_is_proven(tmp_path: Path) -> None:
    report = evaluate(tmp_path, "--prompts", "6", "--tokens", "8", "--weights", "gguf")
    assert_proven(report, 6, bits=True)
    assert report["weights"][0]["agreement"]["same_bits"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    where = tmp_path_factory.mktemp("model")
    return resolve_model(ModelSpec(model=str(tiny_llama_gguf(where / "tiny.gguf"))), where / "cache")


def test_the_reference_tells_its_own_choice_from_any_other(folder: ModelFolder) -> None:
    reference = ReferenceModel(folder, threads=1)
    prompt: list[int] = TEXT[:20]
    answer: list[int] = []
    for _ in range(6):
        ((_, following),) = reference.windows([*prompt, *answer])
        answer.append(int(following[-1].argmax()))
    assert reference.shortfalls(prompt, answer) == [0.0] * 6
    spoilt = [*answer[:3], (answer[3] + 1) % 300, *answer[4:]]
    shortfalls = reference.shortfalls(prompt, spoilt)
    assert shortfalls[:3] == [0.0] * 3
    assert shortfalls[3] > 0.0


@pytest.mark.parametrize(("quantization", "native"), [("none", False), ("none", True), ("int4", True)])
def test_a_text_is_scored_as_the_whole_model_scores_it(folder: ModelFolder, quantization: Quantization, *, native: bool) -> None:
    """In windows over paged blocks; rounded weights show."""
    library: NativeLibrary | None = best_library() if native else None
    region = create_region(memory := AnonymousMemory(region_size(LAYOUT, 40)), LAYOUT, 40, bytes(16))
    register_paged_attention()
    model = load_model(folder, dtype="float32", attn_implementation=PAGED_ATTENTION)
    watched = WatchedModel(model, LAYOUT, region, library=library, quantization=quantization, stored={})
    found = score_text(ReferenceModel(folder, threads=1), watched, TEXT)
    whole = load_model(folder, dtype="float32")
    with torch.inference_mode():
        logits = whole(torch.tensor([TEXT])).logits[0, :-1]  # type: ignore[operator]
        expected = float(torch.nn.functional.cross_entropy(logits, torch.tensor(TEXT[1:])).exp())
    assert found.tokens == len(TEXT) - 1
    assert found.reference_perplexity == pytest.approx(expected, rel=1e-5)
    if quantization == "none":
        assert found.perplexity == pytest.approx(expected, rel=1e-5)
        assert abs(found.divergence) < 1e-7
        assert found.same_likeliest > 0.99
    else:
        assert found.divergence > 2e-7
    del memory
