"""Executors for tests: a tiny random Llama through torch, and short ways to write plans."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from common.engine.executor import Executor
from common.engine.torch_step import build_torch_executor
from common.values.kv_layout import KvLayout
from common.values.sampling import SamplingParameters
from common.values.step import RowResult, SequenceStart, StepPlan, StepRow

VOCABULARY = 300
EOS = 2
LAYOUT = KvLayout(layers=3, kv_heads=2, head_dim=16, block_size=4)
BLOCKS = 160


def tiny_llama(seed: int = 0) -> torch.nn.Module:
    """Random weights, spread so that its logits are far apart and attention matters."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=EOS, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return random_model(config, seed)


def random_model(config: transformers.PreTrainedConfig, seed: int = 0) -> torch.nn.Module:
    """Matrices large enough that a mistake in attention shows in the logits. One thread: two only wait for each other here."""
    torch.set_num_threads(1)
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.5 / parameter.shape[-1] ** 0.5, generator=generator)
    return model.eval()


@dataclass
class Memory:
    """A KV region without a transport, with rubbish in it as after long use."""

    layout: KvLayout = LAYOUT
    blocks: int = BLOCKS
    bytes_: Any = field(init=False)

    def __post_init__(self) -> None:
        self.bytes_ = (ctypes.c_uint8 * (self.blocks * self.layout.block_bytes))()
        ctypes.memset(self.bytes_, 0xFF, len(self.bytes_))  # as floats: NaN

    @property
    def blocks_address(self) -> int:
        return ctypes.addressof(self.bytes_)

    def copy_block(self, source: int, other: "Memory", target: int) -> None:
        size = self.layout.block_bytes
        ctypes.memmove(other.blocks_address + target * size, self.blocks_address + source * size, size)

    def block(self, number: int) -> bytes:
        size = self.layout.block_bytes
        return bytes(self.bytes_[number * size : (number + 1) * size])


def torch_executor(model: torch.nn.Module, memory: Memory) -> Executor:
    return build_torch_executor(model, memory.layout, memory.blocks_address, memory.blocks, "cpu", check=False)


def parameters(**changes: Any) -> SamplingParameters:
    return SamplingParameters(**{"max_tokens": 200, "seed": 5, "temperature": 0.0, **changes})


def started(
    handle: int, tokens: Sequence[int], prompt_length: int | None = None, *, choice: int = 0, **sampling: Any
) -> SequenceStart:
    length = len(tokens) if prompt_length is None else prompt_length
    return SequenceStart(
        handle=handle, choice=choice, prompt_length=length, tokens=tuple(tokens), sampling=parameters(**sampling), eos_token_ids=(EOS,)
    )


def chunk(handle: int, start: int, count: int, blocks: Sequence[int], *, sample: bool = True, scores: bool = False) -> StepRow:
    return StepRow(handle=handle, start=start, count=count, blocks=tuple(blocks), sample=sample, prompt_logprobs=scores)


def run(executor: Executor, *rows: StepRow, starts: Sequence[SequenceStart] = (), ends: Sequence[int] = ()) -> tuple[RowResult, ...]:
    return executor.execute(StepPlan(number=1, rows=rows, starts=tuple(starts), ends=tuple(ends))).rows


def token_of(result: RowResult) -> int:
    assert result.fault is None, result.fault
    assert result.token is not None
    return result.token


def generate(executor: Executor, start: SequenceStart, blocks: Sequence[int], count: int, *, chunks: Sequence[int] = ()) -> list[int]:
    """Prefill in the given chunk lengths (the rest is the last one), decode, and end. `count` new tokens."""
    starts: tuple[SequenceStart, ...] = (start,)
    done = 0
    for length in chunks:
        assert run(executor, chunk(start.handle, done, length, blocks, sample=False), starts=starts)[0].fault is None
        starts, done = (), done + length
    tokens = [token_of(run(executor, chunk(start.handle, done, len(start.tokens) - done, blocks), starts=starts)[0])]
    while len(tokens) < count:
        row = chunk(start.handle, len(start.tokens) + len(tokens) - 1, 1, blocks)
        tokens.append(token_of(run(executor, row)[0]))
    run(executor, ends=[start.handle])
    return tokens


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return [int(token) for token in torch.randint(10, VOCABULARY, (length,), generator=generator)]
