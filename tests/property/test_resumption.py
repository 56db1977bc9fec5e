"""A resumed stream is the rest of the undisturbed one: for any tokens, any loss, any cut of the log, and any event."""

import random
from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from common.mesh.adoption import adopted_request, logged_tokens
from common.mesh.gateway import GatewayCore
from common.mesh.gateway_effects import Deliver, Ended, SendReplay
from common.mesh.request_progress import ChoiceTokens
from common.ports.generation import TokenEvent
from common.protocol.messages import ReplayEntry
from common.protocol.request_record import RequestFacts, RequestRecord
from common.protocol.stored_log import LogEntry, assemble
from common.values.ids import GatewayId, Incarnation, RequestId, WorkerId
from common.values.sampling import SamplingParameters
from common.values.tokens import Ending, NewTokens, PositionLogprobs
from services.gateway.openai.chunks import ChunkEncoder
from services.gateway.openai.event_id import parse_event_id
from services.gateway.openai.plan import RequestPlan
from services.gateway.text.text_model import TextModel
from tests.gateway_twin import tiny_card, tiny_tokenizer

R = RequestId("chatcmpl-1")
W = WorkerId("w")
END = Ending(reason="length")
VOCABULARY = tiny_tokenizer().get_vocab_size()
TRUTHS = st.lists(st.lists(st.integers(4, VOCABULARY - 1), min_size=1, max_size=25), min_size=1, max_size=3)


@cache
def text_model() -> TextModel:
    return TextModel(tiny_card())


def plan_of(truth: list[list[int]], stops: list[str], *, logprobs: bool) -> RequestPlan:
    return RequestPlan(
        id=R,
        kind="chat",
        created=1,
        text_model=text_model(),
        prompts=((5, 6, 7),),
        prompt_tokens=3,
        sampling=sampling_of(logprobs=logprobs),
        n=len(truth),
        stops=tuple(stops),
        stream=True,
        logprobs=0 if logprobs else None,
    )


def sampling_of(*, logprobs: bool) -> SamplingParameters:
    return SamplingParameters(max_tokens=25, seed=1, logprobs=0 if logprobs else None)


def scored(tokens: list[int], *, logprobs: bool) -> tuple[PositionLogprobs, ...]:
    return tuple(PositionLogprobs(logprob=-float(token), rank=1) for token in tokens) if logprobs else ()


def encoded(plan: RequestPlan, events: list[TokenEvent], position: tuple[int, ...] | None = None) -> list[list[bytes]]:
    """The bytes of the events, by choice."""
    encoder = ChunkEncoder(plan, position)
    texts = [plan.choice_text(choice) for choice in range(plan.choices)]
    written: list[list[bytes]] = [[] for _ in texts]
    for event in events:
        shown = texts[event.choice].feed(event)
        if shown is not None and (data := encoder.event(shown)):
            written[event.choice].append(data)
    return written


def whole(tokens: list[int], *, logprobs: bool) -> NewTokens:
    return NewTokens(first=0, tokens=tuple(tokens), logprobs=scored(tokens, logprobs=logprobs), ending=END)


def straight(truth: list[list[int]], *, logprobs: bool) -> list[TokenEvent]:
    """One choice after the other, token by token."""
    events = []
    for choice, tokens in enumerate(truth):
        known = ChoiceTokens()
        known.extend(whole(tokens, logprobs=logprobs))
        events += known.events(choice, 0)
    return events


def random_log(rng: random.Random, truth: list[list[int]], *, logprobs: bool) -> list[LogEntry]:
    """What two workers wrote: cut anywhere, mixed, the second one given what the first had reached; the end may be missing."""
    entries: list[LogEntry] = []
    for choice, tokens in enumerate(truth):
        scores = scored(tokens, logprobs=logprobs)
        known = rng.randint(0, len(tokens) - 1)
        reaches = [(0, rng.randint(known, len(tokens))), (known, rng.randint(known, len(tokens)))]
        for attempt, (at, upto) in enumerate(reaches, 1):
            first = True
            while first or at < upto:
                end = min(upto, at + rng.randint(1, 6))
                start = 0 if first else at
                ending = END if end == len(tokens) else None
                new = NewTokens(first=start, tokens=tuple(tokens[start:end]), logprobs=scores[at:end], ending=ending)
                entries.append(LogEntry(choice=choice, attempt=attempt, writer=f"w{attempt}", new=new))
                at, first = end, False
    keys = [(entry.choice, entry.attempt) for entry in entries]
    order = sorted(keys, key=lambda _: rng.random())
    queues = {key: [entry for entry in entries if (entry.choice, entry.attempt) == key] for key in keys}
    return [queues[key].pop(0) for key in order]


@settings(max_examples=200, deadline=None)
@given(TRUTHS, st.integers(0, 2**32), st.booleans(), st.lists(st.text("abe ", min_size=1, max_size=2), max_size=2))
def test_an_adopted_stream_gives_the_rest_of_the_undisturbed_one(
    truth: list[list[int]], seed: int, logprobs: bool, stops: list[str]
) -> None:
    rng = random.Random(seed)
    plan = plan_of(truth, stops, logprobs=logprobs)
    undisturbed = encoded(plan, straight(truth, logprobs=logprobs))

    log = assemble(random_log(rng, truth, logprobs=logprobs))
    facts = RequestFacts(model=text_model().card.model, sampling=plan.sampling, choices=len(truth))
    record = RequestRecord(state="running", owner=GatewayId("a"), epoch=1, attempt=2, prompt=(5, 6, 7), facts=facts, worker=W)
    core = GatewayCore(gateway=GatewayId("b"), incarnation=Incarnation("i"))
    core.adopt(adopted_request(R, record, log, epoch=2, deadline=None), logged_tokens(facts, log), 10.0)
    core.on_tick(10.0)
    held = [ChoiceTokens() for _ in truth]
    events: list[TokenEvent] = []
    effects = core.take_effects()
    while effects:
        effect = effects.pop(0)
        match effect:
            case Deliver(choice=choice, new=new):
                first = len(held[choice].tokens)
                held[choice].extend(new)
                events += held[choice].events(choice, first)
            case SendReplay(items=items):
                assert all(item.epoch == 2 for item in items)
                entries = []
                for item in items:
                    tokens = truth[item.choice][item.next_index :]
                    new = NewTokens(
                        first=item.next_index, tokens=tuple(tokens), logprobs=scored(tokens, logprobs=logprobs), ending=END
                    )
                    entries.append(ReplayEntry(request_id=R, choice=item.choice, attempt=item.attempt, state="ended", new=new))
                core.on_replay_answer(W, items, entries, 10.0, broker_alive=True)
                effects += core.take_effects()
            case Ended(error=error):
                assert error is None
    assert core.active == 0

    had = [rng.randint(0, len(shown)) for shown in undisturbed]
    reached = [shown[count - 1] if count else None for shown, count in zip(undisturbed, had, strict=True)]
    counts = [0 if event is None else _consumed(event, choice) for choice, event in enumerate(reached)]
    last = ".".join(map(str, counts))
    resumed = encoded(plan, events, parse_event_id(last, plan.choices))
    for rest, shown, count in zip(resumed, undisturbed, had, strict=True):
        assert [_data(event) for event in rest] == [_data(event) for event in shown[count:]]
    if len(truth) == 1:
        assert resumed == [undisturbed[0][had[0] :]]


def _consumed(event: bytes, choice: int) -> int:
    ident = event.partition(b"\n")[0].removeprefix(b"id: ").decode()
    return int(ident.split(".")[choice])


def _data(event: bytes) -> bytes:
    """Without the id, which tells the other choices' places too."""
    return event.partition(b"\n")[2]
