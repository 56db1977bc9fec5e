"""The real small model on native kernels, in float32: transformers' greedy tokens, and the same bits in any batch."""

import os

import pytest
import torch
from tokenizers import Tokenizer

from common.engine.kv_cache_view import KvCacheView
from common.engine.load_model import load_model
from common.engine.model_cache import default_cache_dir
from common.engine.model_source import ModelSpec, resolve_model
from common.engine.native.llama_model import LlamaModel
from common.engine.native.native_forward import NativeForward
from common.engine.paged_batch import BatchRow
from common.values.kv_layout import KvLayout
from tests.native_kernels import best_library

pytestmark = pytest.mark.model

NEW_TOKENS = 12
NEAR = 1e-3
"""Where the first difference is between two candidates whose reference logits lie this close, both are right."""
TEXTS = [
    "The capital of France is",
    "<|im_start|>user\nWrite a haiku about rain.<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    " + "# a comment that goes on and on, 1234567890\n    " * 6,
    "Привет, как дела? 🌍 今日は",
]
LAYOUT = KvLayout(layers=30, kv_heads=3, head_dim=64, block_size=16)


@pytest.fixture(scope="module")
def model_tokens() -> tuple[torch.nn.Module, list[list[int]]]:
    torch.set_num_threads(1)
    folder = resolve_model(ModelSpec(), default_cache_dir(os.environ))
    tokenizer = Tokenizer.from_file(str(folder.path / "tokenizer.json"))
    return load_model(folder, dtype="float32", device="cpu"), [tokenizer.encode(text).ids for text in TEXTS]


def test_greedy_tokens_are_those_of_transformers_alone_and_in_a_batch(model_tokens: tuple[torch.nn.Module, list[list[int]]]) -> None:
    model, prompts = model_tokens
    library = best_library()
    forward = NativeForward(library, LlamaModel(library, model, consume=False))
    cache = KvCacheView(torch.zeros(160, 30, 2, 3, 16, 64), LAYOUT)
    rows = [BatchRow(tokens=p, start=0, blocks=tuple(range(i, 160, 8)), kept=(len(p) - 1,)) for i, p in enumerate(prompts)]
    chunks = [
        BatchRow(tokens=p[:3], start=0, blocks=tuple(range(4 + i, 160, 8)), kept=()) for i, p in enumerate(prompts)
    ]  # the same prompts once more, in two chunks
    forward.logits(cache, chunks)
    rests = [BatchRow(tokens=p[3:], start=3, blocks=tuple(range(4 + i, 160, 8)), kept=(len(p) - 4,)) for i, p in enumerate(prompts)]
    made: list[list[int]] = [[] for _ in prompts]
    for step in range(NEW_TOKENS):
        logits = forward.logits(cache, rows + rests)
        assert torch.equal(logits[:4], logits[4:])
        for row, tokens in zip(logits[:4], made, strict=True):
            tokens.append(int(row.argmax()))
        ends = [(len(p) + step, tokens[-1]) for p, tokens in zip(prompts, made, strict=True)]
        rows, rests = (
            [BatchRow(tokens=[t], start=at, blocks=tuple(range(k + i, 160, 8)), kept=(0,)) for i, (at, t) in enumerate(ends)]
            for k in (0, 4)
        )
    model.set_attn_implementation("eager")  # type: ignore[operator]
    for prompt, tokens in zip(prompts, made, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        for row, token in zip(logits, tokens, strict=True):
            assert float(row.max() - row[token]) < NEAR
