"""The synthetic engine: tokens that any worker makes alike, and a cache that tells whose it is."""

import ctypes
from dataclasses import dataclass

import pytest

from common.engine.synthetic import StepTimes, SyntheticExecutor
from common.engine.synthetic_tokens import prompt_digest
from common.values.errors import SettingsError
from common.values.kv_layout import KvLayout
from common.values.sampling import SamplingParameters
from common.values.step import RowResult, SequenceStart, StepPlan, StepRow

LAYOUT = KvLayout(layers=3, kv_heads=2, head_dim=4, block_size=4)
BLOCKS = 12
PROMPT = (5, 6, 7, 8, 9, 10)
EOS = 3


@dataclass
class Region:
    """A KvRegion in plain memory."""

    layout: KvLayout
    blocks: int

    def __post_init__(self) -> None:
        self.memory = (ctypes.c_uint8 * (self.blocks * self.layout.block_bytes))()
        self.blocks_address = ctypes.addressof(self.memory)
        self.generations = memoryview(bytearray(8 * self.blocks)).cast("Q")

    def seal(self, block: int, *, valid_positions: int) -> bytes:
        raise NotImplementedError("sealing is the transport's; no engine asks for it")

    def copy_block(self, source: int, other: "Region", target: int) -> None:
        size = self.layout.block_bytes
        ctypes.memmove(other.blocks_address + target * size, self.blocks_address + source * size, size)


def start(handle: int, tokens: tuple[int, ...] = PROMPT, prompt_length: int | None = None) -> SequenceStart:
    sampling = SamplingParameters(max_tokens=50, seed=0, min_tokens=2, stop_token_ids=(4,), logprobs=2, prompt_logprobs=1)
    length = len(tokens) if prompt_length is None else prompt_length
    return SequenceStart(handle=handle, choice=0, prompt_length=length, tokens=tokens, sampling=sampling, eos_token_ids=(EOS,))


def step(executor: SyntheticExecutor, row: StepRow, *starts: SequenceStart) -> RowResult:
    return executor.execute(StepPlan(number=0, rows=(row,), starts=starts)).rows[0]


def generate(executor: SyntheticExecutor, handle: int, blocks: tuple[int, ...], count: int) -> list[int]:
    result = step(executor, StepRow(handle=handle, start=0, count=len(PROMPT), blocks=blocks, sample=True), start(handle))
    rows = [StepRow(handle=handle, start=len(PROMPT) + place, count=1, blocks=blocks, sample=True) for place in range(count - 1)]
    tokens = [result.token, *(step(executor, row).token for row in rows)]
    assert None not in tokens
    return [token for token in tokens if token is not None]


def test_tokens_depend_on_the_prompt_and_the_index_alone() -> None:
    plain = generate(SyntheticExecutor(vocab_size=50), 1, (), 20)
    with_region = generate(SyntheticExecutor(vocab_size=50, region=Region(LAYOUT, BLOCKS)), 9, tuple(range(7)), 20)
    assert plain == with_region
    resumed = SyntheticExecutor(vocab_size=50)
    tokens = (*PROMPT, *plain[:10])
    result = step(resumed, StepRow(handle=4, start=0, count=16, blocks=(), sample=True), start(4, tokens, prompt_length=len(PROMPT)))
    assert result.token == plain[10]
    assert EOS not in plain
    assert 4 not in plain[:2]


def test_the_end_comes_where_it_is_configured_but_not_before_min_tokens() -> None:
    ends = SyntheticExecutor(vocab_size=50, ends_at=lambda digest, index: digest == prompt_digest(PROMPT) and index in (1, 5))
    tokens = generate(ends, 1, (), 6)
    assert tokens[5] == EOS
    assert EOS not in tokens[:5]


def test_a_cache_copied_to_another_region_goes_on_and_a_wrong_one_is_noticed() -> None:
    source, target = Region(LAYOUT, BLOCKS), Region(LAYOUT, BLOCKS)
    made = SyntheticExecutor(vocab_size=50, region=source)
    tokens = generate(made, 1, (2, 5, 7, 9), 4)
    sofar = (*PROMPT, *tokens[:3])
    for fault in (None, "swapped", "torn", "neighbour"):
        for block, landing in ((2, 0), (5, 1), (7, 2)):
            source.copy_block(block, target, landing)
        table = (1, 0, 2, 3) if fault == "swapped" else (0, 1, 2, 3)
        if fault == "torn":
            target.memory[LAYOUT.block_bytes + LAYOUT.block_bytes // 2] ^= 1
        if fault == "neighbour":
            source.copy_block(9, target, 1)
        receiver = SyntheticExecutor(vocab_size=50, region=target)
        row = StepRow(handle=3, start=len(sofar) - 1, count=1, blocks=table, sample=True)
        result = step(receiver, row, start(3, sofar, prompt_length=len(PROMPT)))
        if fault is None:
            assert result.token == tokens[3]
        else:
            assert result.fault is not None
            assert result.fault.startswith("kv_mismatch")


def test_a_block_overwritten_while_decoding_is_noticed() -> None:
    region = Region(LAYOUT, BLOCKS)
    executor = SyntheticExecutor(vocab_size=50, region=region)
    generate(executor, 1, (0, 1, 2), 2)
    generate(executor, 2, (1, 4, 5), 2)
    row = StepRow(handle=1, start=7, count=1, blocks=(0, 1, 2), sample=True)
    assert "kv_mismatch" in (step(executor, row).fault or "")
    row = StepRow(handle=2, start=7, count=1, blocks=(1, 4, 5), sample=True)
    assert step(executor, row).fault is None


def test_log_probabilities_are_well_formed() -> None:
    executor = SyntheticExecutor(vocab_size=50)
    row = StepRow(handle=1, start=0, count=len(PROMPT), blocks=(), sample=True, prompt_logprobs=True)
    result = step(executor, row, start(1))
    assert result.logprobs is not None
    assert result.logprobs.top[0] == (result.token, result.logprobs.logprob)
    assert len(result.logprobs.top) == 2
    assert len(result.prompt_logprobs) == len(PROMPT) - 1
    assert [scores.top[0][0] for scores in result.prompt_logprobs] == list(PROMPT[1:])


def test_step_time_is_a_formula_of_the_plan() -> None:
    times = StepTimes(fixed=1.0, per_prefill_token=0.5, per_decode_row=0.25)
    chunk = StepRow(handle=1, start=0, count=6, blocks=(), sample=False)
    one = StepRow(handle=2, start=6, count=1, blocks=(), sample=True)
    assert times.seconds(StepPlan(number=0, rows=(chunk, one, one))) == 1.0 + 3.0 + 0.5
    assert times.seconds(StepPlan(number=0, rows=())) == 0.0


def test_a_layout_without_room_for_the_pattern_is_refused() -> None:
    with pytest.raises(SettingsError, match="multiple of 8"):
        SyntheticExecutor(vocab_size=50, region=Region(KvLayout(layers=1, kv_heads=1, head_dim=3), 2))
