"""The real small model: paged attention, chunks and batches against transformers' own generation, in float32."""

import os
from collections.abc import Sequence

import pytest
import torch
from tokenizers import Tokenizer

from common.engine.load_model import load_model
from common.engine.model_cache import default_cache_dir
from common.engine.model_source import ModelSpec, resolve_model
from common.engine.torch_step import build_torch_executor
from common.values.kv_layout import KvLayout
from tests.step_engines import Memory, chunk, run, started, token_of

pytestmark = pytest.mark.model

NEW_TOKENS = 10
NEAR = 1e-3
"""Where the first difference is between two candidates whose reference logits lie this close, both are right."""
TEXTS = [
    "The capital of France is",
    "<|im_start|>user\nWrite a haiku about rain.<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    " + "# a comment that goes on and on, 1234567890\n    " * 8,
    "Привет, как дела? 🌍 今日は",
]
LAYOUT = KvLayout(layers=30, kv_heads=3, head_dim=64, block_size=16)


@pytest.fixture(scope="module")
def folder_tokens() -> tuple[torch.nn.Module, list[list[int]]]:
    torch.set_num_threads(1)
    folder = resolve_model(ModelSpec(), default_cache_dir(os.environ))
    tokenizer = Tokenizer.from_file(str(folder.path / "tokenizer.json"))
    model = load_model(folder, dtype="float32", device="cpu")
    return model, [tokenizer.encode(text).ids for text in TEXTS]


def reference(model: torch.nn.Module, prompt: Sequence[int]) -> tuple[list[int], list[torch.Tensor]]:
    output = model.generate(  # type: ignore[operator]
        torch.tensor([list(prompt)]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
        eos_token_id=None, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return [int(token) for token in output.sequences[0, len(prompt) :]], [row[0] for row in output.logits]


def test_greedy_tokens_in_a_batch_of_chunks_are_those_of_transformers(folder_tokens: tuple[torch.nn.Module, list[list[int]]]) -> None:
    model, prompts = folder_tokens
    model.set_attn_implementation("eager")  # type: ignore[operator]
    expected = [reference(model, prompt) for prompt in prompts]
    memory = Memory(LAYOUT, 128)
    executor = build_torch_executor(model, LAYOUT, memory.blocks_address, memory.blocks, "cpu")
    tokens: list[list[int]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    starts = [started(number, prompt) for number, prompt in enumerate(prompts)]
    while any(len(made) < NEW_TOKENS for made in tokens):
        rows = []
        for number, prompt in enumerate(prompts):
            count = min(100, len(prompt) - done[number]) if done[number] < len(prompt) else 1
            if len(tokens[number]) < NEW_TOKENS:
                sample = done[number] + count >= len(prompt)
                rows.append(chunk(number, done[number], count, range(number, 128, len(prompts)), sample=sample))
        for row, result in zip(rows, run(executor, *rows, starts=starts), strict=True):
            done[row.handle] += row.count
            if row.sample:
                tokens[row.handle].append(token_of(result))
        starts = []
    for made, (right, logits) in zip(tokens, expected, strict=True):
        place = next((i for i in range(NEW_TOKENS) if made[i] != right[i]), None)
        if place is not None:
            assert abs(float(logits[place][made[place]] - logits[place][right[place]])) < NEAR
