"""What lies in the store, where another release may have written it: how each format is read, and an example of it with every
field filled, written by the present code.
"""

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from common.adapters.memory_store import MemoryStore
from common.mesh.request_store import RequestStore
from common.ports.generation import GenerationRequest
from common.protocol.request_record import (
    IdempotencyMark,
    RecordedError,
    RequestFacts,
    attempt_change,
    ending_change,
    first_record,
    parse_record,
)
from common.protocol.stored_log import LogEntry, decode_entry, encode_entry
from common.protocol.subjects import Names
from common.runtime.dtype_agreement import DtypeAgreement
from common.runtime.model_cards import publish_card, read_card
from common.values.ids import GatewayId, Incarnation, RequestId
from common.values.model_card import ModelCard
from common.values.objectives import Speed
from common.values.request_account import RequestAccount
from common.values.request_class import WantedSpeed
from common.values.sampling import SamplingParameters
from common.values.tokens import Ending, NewTokens
from services.gateway.openai.plan_record import PlanRecord, read_plan
from tests.example_messages import LOGPROB, MODEL, NEW

NAMES = Names("m")
TTL_S = 60.0
REQUEST = RequestId("r")
MARK = IdempotencyMark(key="k", digest=b"d" * 16)
SAMPLING = SamplingParameters(
    max_tokens=9,
    seed=5,
    temperature=0.5,
    top_p=0.9,
    top_k=7,
    min_p=0.1,
    repetition_penalty=1.1,
    presence_penalty=0.2,
    frequency_penalty=0.3,
    min_tokens=2,
    ignore_eos=True,
    stop_token_ids=(1, 2),
    logit_bias={3: -1.5},
    logprobs=2,
    prompt_logprobs=1,
)
PLAN = PlanRecord(
    id="r",
    kind="chat",
    created=1_700_000_000,
    prompts=2,
    prompt_tokens=3,
    tail=[1, 2, 3],
    n=2,
    stops=["\n"],
    include_stop=True,
    skip_special_tokens=False,
    stream=True,
    include_usage=True,
    logprobs=2,
    prompt_logprobs=1,
    echo=True,
)
FACTS = RequestFacts(
    model=MODEL,
    sampling=SAMPLING,
    choices=2,
    body=msgspec.msgpack.encode(PLAN),
    salt=b"s",
    tenant="t",
    lingers=True,
    keep_prompt=True,
    deadline_s=30.0,
    idempotency=MARK,
)
WANTED = WantedSpeed(request_class="quick", ttft_s=0.5, tpot_s=0.05, late="refuse", account="a")
HASTY_FACTS = msgspec.structs.replace(FACTS, wanted=WANTED)
ACCOUNT = RequestAccount(
    request_class="quick",
    placement="split",
    ttft_s=0.5,
    tpot_s=0.05,
    best_effort=True,
    gives_way=True,
    predicted=Speed(ttft_s=0.25, tpot_s=0.0125),
    had=Speed(ttft_s=0.375, tpot_s=0.015625),
    stages={"prefill_queue": 0.125, "prefill": 0.25},
)
CARD = ModelCard(
    model=MODEL,
    max_model_len=2048,
    vocab_size=49152,
    tokenizer=b"{}",
    eos_token_ids=(2, 3),
    bos_token_id=1,
    chat_template="{{ messages }}",
    special_tokens={"eos_token": "</s>"},
    created=1_700_000_000,
    architecture="LlamaForCausalLM",
    dtype="float32",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFormat:
    """`read` takes what lies in the store (fields, or an entry of a list) and gives what the product makes of it."""

    name: str
    read: Callable[[Any], Awaitable[object]]


async def _read_record(fields: dict[str, bytes]) -> object:
    return parse_record(fields)


async def _read_plan(data: bytes) -> object:
    return read_plan(GenerationRequest(request_id=REQUEST, model=MODEL.name, prompt=(), sampling=SAMPLING, body=data))


async def _read_entry(data: bytes) -> object:
    return decode_entry(data)


async def _read_card(fields: dict[str, bytes]) -> object:
    store = _store()
    await store.put(NAMES.model_key(MODEL), fields, ttl_s=TTL_S)
    return await read_card(store, NAMES, MODEL)


async def _read_dtype(fields: dict[str, bytes]) -> object:
    store = _store()
    await store.put(NAMES.dtype_key(MODEL), fields, ttl_s=TTL_S)
    return {"dtype": await DtypeAgreement(store, NAMES.dtype_key(MODEL)).fixed()}


async def _read_idempotency(fields: dict[str, bytes]) -> object:
    store = _store()
    await store.put(NAMES.idempotency_key(MARK.key), fields, ttl_s=TTL_S)
    request, digest = await _requests(store).claim(MARK, RequestId("another"))
    return {"request": request, "digest": digest}


FORMATS = (
    StoredFormat(name="request_record", read=_read_record),
    StoredFormat(name="plan", read=_read_plan),
    StoredFormat(name="log_entry", read=_read_entry),
    StoredFormat(name="model_card", read=_read_card),
    StoredFormat(name="dtype", read=_read_dtype),
    StoredFormat(name="idempotency", read=_read_idempotency),
)


async def examples() -> list[tuple[str, str, object]]:
    """Format, name, and what the present code writes into the store. A format that gains a field gains an example too: what was
    released keeps its name and its bytes."""
    store = _store()
    await publish_card(store, NAMES, CARD)
    await DtypeAgreement(store, NAMES.dtype_key(MODEL)).hold("bfloat16")
    await _requests(store).claim(MARK, REQUEST)
    return [
        *(("request_record", name, fields) for name, fields in _records()),
        ("plan", "chat", FACTS.body),
        *(("log_entry", name, data) for name, data in _entries()),
        ("model_card", "full", await store.read(NAMES.model_key(MODEL))),
        ("dtype", "bfloat16", await store.read(NAMES.dtype_key(MODEL))),
        ("idempotency", "claimed", await store.read(NAMES.idempotency_key(MARK.key))),
    ]


def _records() -> Iterator[tuple[str, dict[str, bytes]]]:
    """`ended` and `failed` hold a timeline."""
    new = first_record(gateway=GatewayId("g"), epoch=2, prompt=(1, 2, 3), facts=FACTS, created=1_700_000_000.25)
    placed = {**new, **attempt_change(3, "w", "d")}
    seconds = {"dispatched": 0.001, "first_token": 0.25, "ended": 1.5}
    error = RecordedError(message="m", code="request_poisoned", status=500)
    yield "admitted", new
    yield "placed", placed
    yield "ended", {**placed, **ending_change("ended", seconds=seconds, tokens=9, error=None, keep_prompt=True)}
    hasty = first_record(gateway=GatewayId("g"), epoch=2, prompt=(1, 2, 3), facts=HASTY_FACTS, created=1_700_000_000.25)
    counted = ending_change("ended", seconds=seconds, tokens=9, error=None, keep_prompt=True, account=ACCOUNT)
    yield "accounted", {**hasty, **attempt_change(3, "w", "d"), **counted}
    yield "failed", {**placed, **ending_change("failed", seconds=seconds, tokens=4, error=error, keep_prompt=False)}


def _entries() -> Iterator[tuple[str, bytes]]:
    yield "taken_over", encode_entry(LogEntry(choice=1, attempt=2, writer="i", new=NEW, epoch=3))
    late = Ending(reason="error", error_code="deadline_exceeded", error_message="late")
    yield "whole", encode_entry(LogEntry(choice=1, attempt=2, writer="i", new=NEW))
    yield (
        "middle",
        encode_entry(LogEntry(choice=0, attempt=1, writer="i", new=NewTokens(first=7, tokens=(5, 6), logprobs=(LOGPROB,) * 2))),
    )
    yield "failed", encode_entry(LogEntry(choice=0, attempt=1, writer="i", new=NewTokens(first=2, tokens=(), ending=late)))


def _store() -> MemoryStore:
    return MemoryStore(lambda: 0.0)


def _requests(store: MemoryStore) -> RequestStore:
    return RequestStore(store, NAMES, gateway=GatewayId("g"), incarnation=Incarnation("i"), wall_clock=lambda: 0.0)
