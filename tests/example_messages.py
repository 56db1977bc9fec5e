"""One of each message on the wire, with every field filled, beside the decoder that takes it: for the tests of the format."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec

from common.protocol import messages as m
from common.values.cache_page import CachePage
from common.values.ids import Incarnation, ModelKey, WorkerId
from common.values.kv_layout import Fingerprint, KvLayout
from common.values.sampling import SamplingParameters
from common.values.step_coefficients import StepCoefficients
from common.values.tokens import Ending, NewTokens, PositionLogprobs
from common.values.worker import WorkerSnapshot

SAMPLING = SamplingParameters(max_tokens=4, seed=1, logit_bias={3: -1.5}, stop_token_ids=(1, 2), logprobs=2)
FINGERPRINT = Fingerprint(weights="w", dtype="float32", layout=KvLayout(layers=1, kv_heads=1, head_dim=8))
LOGPROB = PositionLogprobs(logprob=-0.5, rank=1, top=((3, -0.5), (4, -1.0)))
NEW = NewTokens(first=0, tokens=(3,), logprobs=(LOGPROB,), prompt_logprobs=(LOGPROB,), ending=Ending(reason="stop", stop_token=3))
MODEL = ModelKey("m", "1")
SEQUENCE: dict[str, Any] = {"request_id": "r", "choice": 1, "attempt": 2}
OFFERED: dict[str, Any] = SEQUENCE | {"number": 3}
RESERVATION = b"r" * 16
SNAPSHOT = WorkerSnapshot(
    worker=WorkerId("w"),
    incarnation=Incarnation("i"),
    model=MODEL,
    role="both",
    state="ready",
    sequence_number=1,
    control_host="h",
    control_port=1,
    fingerprint=FINGERPRINT,
    max_model_len=10,
    max_num_seqs=1,
    blocks_total=1,
    blocks_free=1,
    blocks_cached=0,
    peers={"p": "shm"},
)
STEP_TIME = StepCoefficients(
    prefill_base_s=0.01,
    prefill_per_token_s=0.001,
    prefill_per_pair_s=1e-7,
    decode_base_s=0.02,
    decode_per_kv_token_s=1e-6,
    decode_per_sequence_s=0.002,
    knee=8,
    beyond=(0.01, 1e-6, 0.003),
)
MEASURED = replace(
    SNAPSHOT,
    step_time=STEP_TIME,
    prefill_queue_s=0.5,
    decoding=2,
    decoding_kv_tokens=300,
    stream_slack_s=0.25,
    tokens_left=12.5,
    transfer_base_s=0.01,
    transfer_per_token_s=1e-5,
    reserved_tokens_free=100,
    changing=True,
    role_decision=4,
)

INBOX: list[msgspec.Struct] = [
    m.Dispatch(
        request_id="r",
        attempt=1,
        gateway="g",
        incarnation="i",
        model=MODEL,
        prompt=m.pack_ids([1, 2]),
        choices=[m.ChoiceState(choice=0, tokens=[5])],
        sampling=SAMPLING,
        decode_worker="d",
        salt=b"s",
        remaining_s=1.5,
        ttft_left_s=2.5,
        tpot_s=0.1,
    ),
    m.Cancel(request_id="r", attempt=1),
    m.Cancel(request_id="r", attempt=1, choices=[0, 2]),
    m.TellCache(),
    m.Dispatch(
        request_id="r",
        attempt=1,
        gateway="g",
        incarnation="i",
        model=MODEL,
        prompt=m.pack_ids([1, 2]),
        choices=[m.ChoiceState(choice=0)],
        sampling=SAMPLING,
        remaining_s=1.5,
        ttft_left_s=1.25,
        tpot_s=0.05,
        best_effort=True,
        gives_way=True,
        expected_tokens=17,
    ),
    m.RoleChange(role="decode", decision=4),
    m.Dispatch(
        request_id="r",
        attempt=3,
        gateway="g",
        incarnation="i",
        model=MODEL,
        prompt=m.pack_ids([1, 2]),
        choices=[m.ChoiceState(choice=0, tokens=[5])],
        sampling=SAMPLING,
        remaining_s=1.5,
        ttft_left_s=1.25,
        tpot_s=0.05,
        expected_tokens=17,
        suspect=True,
        accepted_before=True,
    ),
]
CONTROL: list[msgspec.Struct] = [
    m.Hello(worker="w", incarnation="i", model=MODEL, fingerprint=FINGERPRINT, transport=b"t"),
    m.Offer(
        **OFFERED,
        gateway="g",
        prompt=m.pack_ids([1]),
        tokens=[2],
        sampling=SAMPLING,
        positions=2,
        salt=b"s",
        remaining_s=2.0,
        tpot_s=0.1,
    ),
    m.Accept(**OFFERED, first_block=1, reservation=RESERVATION),
    m.Busy(**OFFERED),
    m.Refuse(**OFFERED, reason="stale"),
    m.Ready(**OFFERED, reservation=RESERVATION, blocks=[m.ReadyBlock(index=0, block=1, generation=2, checksum=b"c" * 16)]),
    m.Last(**OFFERED, reservation=RESERVATION, new=NEW),
    m.Ack(**SEQUENCE, reservation=RESERVATION),
    m.Withdraw(**OFFERED),
    m.ForwardedCancel(**SEQUENCE),
    m.Held(seen=3, sequences=[m.HeldSequence("r", 0, 1, 2, True)]),
    m.Offer(
        **OFFERED,
        gateway="g",
        prompt=m.pack_ids([1]),
        tokens=[2],
        sampling=SAMPLING,
        positions=2,
        remaining_s=2.0,
        tpot_s=0.05,
        spent_s=0.5,
        best_effort=True,
        gives_way=True,
        expected_tokens=17,
    ),
    m.Last(**OFFERED, reservation=RESERVATION, new=NEW, spent_s=0.5, held_s=0.25),
]
FRAME = m.FrameEntry(request_id="r", choice=0, attempt=1, new=NEW)
STAGES = m.StageSeconds(prefill_queue_s=0.1, prefill_s=0.2, transfer_s=0.3, decode_queue_s=0.4)
STAMPED = m.FrameEntry(request_id="r", choice=0, attempt=1, new=NEW, stages=STAGES)
ITEM = m.ReplayItem(request_id="r", choice=0, attempt=1, next_index=0)
ENTRY = m.ReplayEntry(request_id="r", choice=0, attempt=1, state="moved", new=NEW, moved_to="d")
SEEN = m.SeenArrival(prompt_tokens=3, output_tokens=4, ttft_s=0.5, tpot_s=0.05)
ARRIVALS = m.ModelArrivals(model=MODEL, arrived=7, seen=[SEEN])
DECISION = m.Decision(
    planner="p",
    number=3,
    model=MODEL,
    acting=True,
    reason="gain",
    worker="w",
    role="prefill",
    change=2,
    rate=1.5,
    pressure_prefill=0.5,
    pressure_decode=0.25,
    gain=0.125,
)
ALONE: list[tuple[msgspec.Struct, Callable[[bytes], msgspec.Struct]]] = [
    (m.DispatchReply(request_id="r", attempt=1, verdict="refused", code="c", message="m"), m.decode_dispatch_reply),
    (m.TokenFrame(worker="w", incarnation="i", entries=[FRAME]), m.decode_token_frame),
    (m.ReplayRequest(items=[ITEM]), m.decode_replay_request),
    (m.ReplayReply(worker="w", incarnation="i", entries=[ENTRY], more=True), m.decode_replay_reply),
    (m.Snapshot(snapshot=SNAPSHOT, gone=True, cache=CachePage(number=3, restart=True, added=b"n" * 32)), m.decode_snapshot),
    (m.GatewayBeat(gateway="g", incarnation="i"), m.decode_gateway_beat),
    (m.Snapshot(snapshot=MEASURED), m.decode_snapshot),
    (m.GatewayLoad(gateway="g", incarnation="i", models=[ARRIVALS], free=True), m.decode_gateway_load),
    (DECISION, m.decode_decision),
    (m.TokenFrame(worker="w", incarnation="i", entries=[STAMPED]), m.decode_token_frame),
]
MESSAGES: list[tuple[msgspec.Struct, Callable[[bytes], msgspec.Struct]]] = [
    *((message, m.decode_inbox) for message in INBOX),
    *((message, m.decode_control) for message in CONTROL),
    *ALONE,
]
DECODERS = sorted({decode for _, decode in MESSAGES}, key=lambda decode: decode.__name__)
