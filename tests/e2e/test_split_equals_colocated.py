"""Law 3 on the real model: what goes through prefill worker, hand-off and decode worker equals what a colocated worker
makes, token for token, and equals transformers' own choice at every position.

Both meshes run at once: two workers that hand off (their tier is asserted), and one colocated worker.
"""

import asyncio
import os
import random
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch
from tokenizers import Tokenizer

from common.engine.load_model import load_model
from common.engine.model_cache import default_cache_dir
from common.engine.model_source import ModelSpec, resolve_model
from common.ports.generation import GenerationRequest, TokenEvent
from common.values.ids import RequestId
from common.values.sampling import SamplingParameters
from services.gateway.mesh_client import LiveMesh
from tests.e2e.real_mesh import RealMesh, make_mesh, mesh_client
from tests.servers import running_nats, running_valkey

pytestmark = [pytest.mark.model, pytest.mark.servers, pytest.mark.timeout(900)]
NEAR_TIE = 1e-3
KV = ("--kv-cache-memory", "600MiB", "--max-model-len", "2048", "--dtype", "float32")
EOS = 2


@asynccontextmanager
async def two_meshes(tiers: str) -> AsyncIterator[tuple[LiveMesh, LiveMesh, RealMesh]]:
    async with running_nats() as nats, running_valkey() as valkey:
        split, whole = make_mesh(nats.url, valkey.url), make_mesh(nats.url, valkey.url)
        try:
            split.start_worker("p0", "prefill", "--kv-tiers", tiers, *KV)
            split.start_worker("d0", "decode", "--kv-tiers", tiers, *KV)
            whole.start_worker("b0", "both", *KV)
            async with mesh_client(split) as through_split, mesh_client(whole) as through_whole:
                await split.settled()
                await whole.settled()
                yield through_split, through_whole, split
        finally:
            split.stop()
            whole.stop()


def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """50 prompts of 1 to 1,500 tokens: chat and raw, code, several scripts, repetition, noise."""
    rng = random.Random(20)
    subjects = ("the sea", "a broken clock", "Ρώμη και Αθήνα", "数学の歴史", "квантовая механика", "🙂🚲 emoji")
    texts = [f"<|im_start|>user\nWrite about {subject}.<|im_end|>\n<|im_start|>assistant\n" for subject in subjects]
    texts += [
        "def fibonacci(n):\n",
        "1, 1, 2, 3, 5, 8, 13,",
        "Q: What is 17 * 23?\nA:",
        '{"name": "Ada", "born":',
        "A",
        "The",
        "naïve café façades",
        "\n\n",
    ]
    texts += [f"Chapter {n}. In the year {1500 + 17 * n}, the" for n in range(12)]
    words = ["river", "stone", "light", "winter", "engine", "paper", "seven", "music", "garden", "theory", "signal", "copper"]
    ids = [tokenizer.encode(text).ids for text in texts]
    for length in (*range(15, 19), *range(31, 35), 47, 48, 49, 64, 100, 127, 128, 129, 200, 255, 256, 257, 333, 512, 777, 1500):
        text = " ".join(rng.choice(words) for _ in range(length))
        ids.append(tokenizer.encode(text).ids[:length])
    return ids[:50]


def wanted(prompt: list[int], **sampling: object) -> GenerationRequest:
    choices = int(sampling.pop("n", 1))  # type: ignore[call-overload]
    values = {"max_tokens": 32, "seed": 5, "temperature": 0.0, **sampling}
    return GenerationRequest(
        request_id=RequestId(secrets.token_hex(8)),
        model="SmolLM2-135M-Instruct",
        prompt=tuple(prompt),
        sampling=SamplingParameters(**values),  # type: ignore[arg-type]
        choices=choices,
    )


async def events_of(mesh: LiveMesh, request: GenerationRequest) -> list[list[TokenEvent]]:
    """All events by choice, gapless, each choice ended."""
    events: list[list[TokenEvent]] = [[] for _ in range(request.choices)]
    generation = await mesh.start(request)
    try:
        while batch := await generation.next_events():
            for event in batch:
                assert event.index == sum(1 for e in events[event.choice] if e.token is not None)
                events[event.choice].append(event)
    finally:
        await generation.close()
    assert all(e and e[-1].ending is not None for e in events)
    return events


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [event.token for event in events if event.token is not None]


async def all_of(mesh: LiveMesh, requests: list[GenerationRequest], at_once: int) -> list[list[list[TokenEvent]]]:
    places = asyncio.Semaphore(at_once)

    async def one(request: GenerationRequest) -> list[list[TokenEvent]]:
        async with places:
            return await events_of(mesh, request)

    return list(await asyncio.gather(*(one(request) for request in requests)))


def check_against_transformers(prompts: list[list[int]], made: list[list[int]]) -> int:
    """Every token is the reference's argmax given what came before it, or lies within NEAR_TIE of it; returns how many do."""
    folder = resolve_model(ModelSpec(), default_cache_dir(os.environ))
    model = load_model(folder, dtype="float32", attn_implementation="eager")
    near_ties = 0
    with torch.inference_mode():
        for prompt, tokens in zip(prompts, made, strict=True):
            ids = torch.tensor([[*prompt, *tokens]])
            logits = model(ids, logits_to_keep=len(tokens) + 1, use_cache=False).logits[0, :-1]
            best = logits.argmax(-1)
            for i, token in enumerate(tokens):
                if token != int(best[i]):
                    difference = float(logits[i, best[i]] - logits[i, token])
                    assert difference <= NEAR_TIE, f"prompt of {len(prompt)} tokens, token {i}: off by {difference}"
                    near_ties += 1
    return near_ties


async def test_greedy_tokens_equal_colocated_and_transformers() -> None:
    async with two_meshes("shm,ucx,tcp") as (split, whole, mesh):
        tokenizer = Tokenizer.from_buffer(split.card("SmolLM2-135M-Instruct").tokenizer)
        asked = prompts(tokenizer)
        assert len(asked) == 50
        first = await all_of(split, [wanted(p, ignore_eos=True) for p in asked], at_once=8)
        second = await all_of(whole, [wanted(p, ignore_eos=True) for p in asked], at_once=6)
        through_split = [tokens_of(events[0]) for events in first]
        colocated = [tokens_of(events[0]) for events in second]
        assert all(len(tokens) == 32 for tokens in through_split)
        assert through_split == colocated
        assert "tier=shm" in mesh.log("p0") + mesh.log("d0")
    near_ties = check_against_transformers(asked, through_split)
    print(f"{len(asked)} prompts x 32 tokens: {near_ties} tokens differ from transformers' within {NEAR_TIE}")


@pytest.mark.parametrize("tier", ["ucx", pytest.param("tcp", marks=pytest.mark.slow)])
async def test_ends_and_state_are_the_same_split_and_colocated(tier: str) -> None:
    async with two_meshes(tier) as (split, whole, mesh):
        tokenizer = Tokenizer.from_buffer(split.card("SmolLM2-135M-Instruct").tokenizer)
        story = tokenizer.encode("<|im_start|>user\nTell me a story.<|im_end|>\n<|im_start|>assistant\n").ids
        greedy = tokens_of((await events_of(whole, wanted(story, max_tokens=4)))[0])
        cases: dict[str, dict[str, object]] = {
            "one token": {"max_tokens": 1},
            "stop at token 0": {"stop_token_ids": (greedy[0],)},
            "stop at token 2": {"stop_token_ids": (greedy[2],)},
            "min_tokens holds a stop back": {"stop_token_ids": (greedy[0],), "min_tokens": 6, "max_tokens": 12},
            "eos at token 0": {"logit_bias": {EOS: 100.0}},
            "eos ignored": {"logit_bias": {EOS: 100.0}, "ignore_eos": True, "max_tokens": 5},
            "seeded": {"temperature": 0.9, "seed": 11},
            "seeded, n": {"temperature": 1.0, "seed": 12, "n": 3, "max_tokens": 16},
            "top-p, top-k, min-p": {"temperature": 1.1, "top_p": 0.9, "top_k": 40, "min_p": 0.02, "seed": 13},
            "penalties": {
                "repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.4, "temperature": 0.7, "seed": 14,
            },
            "logprobs": {"logprobs": 3, "max_tokens": 8},
            "prompt logprobs": {"prompt_logprobs": 1, "logprobs": 0, "max_tokens": 3},
        }  # fmt: skip
        for name, sampling in cases.items():
            one = await events_of(split, wanted(story, **dict(sampling)))
            other = await events_of(whole, wanted(story, **dict(sampling)))
            assert [tokens_of(e) for e in one] == [tokens_of(e) for e in other], name
            assert [e[-1].ending for e in one] == [e[-1].ending for e in other], name
            for mine, theirs in zip(one, other, strict=True):
                assert _rounded(mine) == _rounded(theirs), name
        assert f"tier={tier}" in mesh.log("p0") + mesh.log("d0")


def _rounded(events: list[TokenEvent]) -> list[object]:
    """Log-probabilities to three digits: their last bits may depend on the shape of the batch."""

    def shown(scores: object) -> object:
        if scores is None:
            return None
        return (round(scores.logprob, 3), [token for token, _ in scores.top], scores.rank)  # type: ignore[attr-defined]

    return [(shown(e.logprobs), [shown(s) for s in e.prompt_logprobs or ()]) for e in events]
