"""What the gateway's tests share: a small byte-level tokenizer, a model card, and an in-memory mesh.

The mesh's tokens are a function of request and index: it says the text that the request's `seed` names, over and over. It
keeps the port's promises: events per choice in order and gapless, nothing lost when a reader is cancelled, `close` idempotent.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from common.ports.generation import Attached, GenerationRequest, RequestTimeline, TokenEvent
from common.protocol.request_record import IdempotencyMark
from common.values.errors import IdempotencyKeyReused, ModelNotFound, NeverFits, RequestFailed, SegueError, StreamNotFound
from common.values.ids import ModelKey, RequestId
from common.values.model_card import ModelCard
from common.values.tokens import Ending, PositionLogprobs

EOS, BOS, IM_START, IM_END = 0, 1, 2, 3
MODEL = "tiny/model"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SAYINGS = (
    "The quick brown fox jumps over the lazy dog. ",
    "Grüße aus 東京, 👩‍👩‍👧 and naïve façades — done. ",
    "one two three four five six seven STOP eight nine ten. ",
)


@cache
def tiny_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([SAYINGS[0], SAYINGS[2]] * 5, trainer)
    return tokenizer


@cache
def saying_tokens(seed: int) -> tuple[int, ...]:
    return tuple(tiny_tokenizer().encode(SAYINGS[seed % len(SAYINGS)]).ids)


def tiny_card(*, name: str = MODEL, max_model_len: int = 4096, chat_template: str | None = TEMPLATE) -> ModelCard:
    tokenizer = tiny_tokenizer()
    return ModelCard(
        model=ModelKey(name, "r1"),
        max_model_len=max_model_len,
        vocab_size=tokenizer.get_vocab_size(),
        tokenizer=tokenizer.to_str().encode(),
        eos_token_ids=(EOS,),
        bos_token_id=BOS,
        chat_template=chat_template,
        special_tokens={"bos_token": "<s>", "eos_token": "<|endoftext|>"},
        created=1_700_000_000,
    )


@dataclass
class Script:
    """How the mesh behaves. `gate`: tokens wait for it. `hold_after`: silence from that index on, until cancelled.
    `fail_at`: the request fails there. `eos_at`: the choice ends there with an end-of-sequence token."""

    gate: asyncio.Event | None = None
    hold_after: int | None = None
    fail_at: int | None = None
    eos_at: int | None = None
    batch: int = 1
    refuse: SegueError | None = None


@dataclass
class TwinMesh:
    """An in-memory MeshClient. `open` and `cancelled` let tests see what was released."""

    served: Sequence[ModelCard] = field(default_factory=lambda: (tiny_card(),))
    script: Script = field(default_factory=Script)
    not_ready: dict[str, str] = field(default_factory=dict)
    requests: list[GenerationRequest] = field(default_factory=list)
    open: "dict[RequestId, TwinGeneration]" = field(default_factory=dict)
    cancelled: set[tuple[RequestId, int]] = field(default_factory=set)
    made: int = 0
    marks: dict[str, tuple[RequestId, bytes]] = field(default_factory=dict)

    def cards(self) -> Sequence[ModelCard]:
        return self.served

    def card(self, name: str) -> ModelCard:
        for card in self.served:
            if card.model.name == name:
                return card
        raise ModelNotFound(f"there is no model {name!r}; there are: {', '.join(c.model.name for c in self.served)}", param="model")

    def readiness(self) -> dict[str, str]:
        return self.not_ready

    async def attach(self, request_id: RequestId, tenant: str) -> Attached:
        """Another reader of what was started here, from the first token on."""
        for request in self.requests:
            if request.request_id == request_id and request.tenant == tenant:
                return Attached(request=request, generation=await self.start(request))
        raise StreamNotFound("there is no such stream")

    async def timeline(self, request_id: RequestId, tenant: str) -> RequestTimeline:
        raise StreamNotFound("there are no records here")

    async def claim(self, mark: IdempotencyMark, request_id: RequestId) -> RequestId:
        holder, digest = self.marks.setdefault(mark.key, (request_id, mark.digest))
        if digest != mark.digest:
            raise IdempotencyKeyReused("this key came with another body")
        return holder

    async def release(self, mark: IdempotencyMark, request_id: RequestId) -> None:
        if self.marks.get(mark.key, ("", b""))[0] == request_id:
            del self.marks[mark.key]

    async def start(self, request: GenerationRequest) -> "TwinGeneration":
        if self.script.refuse is not None:
            raise self.script.refuse
        if len(request.prompt) > 3000:
            raise NeverFits("too long for the pool")
        self.requests.append(request)
        generation = TwinGeneration(self, request)
        self.open[request.request_id] = generation
        return generation


class TwinGeneration:
    def __init__(self, mesh: TwinMesh, request: GenerationRequest) -> None:
        self._mesh = mesh
        self._script = mesh.script
        self._request = request
        self._next = dict.fromkeys(range(request.choices), 0)
        self._wake = asyncio.Event()
        self._ready: deque[TokenEvent] = deque()

    @property
    def request_id(self) -> RequestId:
        return self._request.request_id

    async def next_events(self) -> Sequence[TokenEvent]:
        while True:
            if self._script.gate is not None and self._next:
                await self._script.gate.wait()
            if not self._next:
                return []
            await asyncio.sleep(0)
            events = [event for _ in range(self._script.batch) for event in self._step()]
            if events:
                return events
            self._wake.clear()
            if self._next:
                await self._wake.wait()

    def _step(self) -> list[TokenEvent]:
        events = []
        for choice, index in list(self._next.items()):
            if self._script.hold_after is not None and index >= self._script.hold_after:
                continue
            if self._script.fail_at is not None and index >= self._script.fail_at:
                raise RequestFailed("the workers died", code="worker_lost", status=503)
            events.append(self._token(choice, index))
        return events

    def _token(self, choice: int, index: int) -> TokenEvent:
        sampling = self._request.sampling
        tokens = saying_tokens(sampling.seed + choice)
        token = tokens[index % len(tokens)]
        ending: Ending | None = None
        if self._script.eos_at == index and not sampling.ignore_eos:
            token, ending = EOS, Ending(reason="stop", stop_token=EOS)
        elif token in sampling.stop_token_ids:
            ending = Ending(reason="stop", stop_token=token)
        elif index + 1 == sampling.max_tokens:
            ending = Ending(reason="length")
        self._next[choice] += 1
        self._mesh.made += 1
        if ending is not None:
            del self._next[choice]
        return TokenEvent(
            choice=choice,
            index=index,
            token=token,
            ending=ending,
            logprobs=None if sampling.logprobs is None else made_up_logprobs(token, sampling.logprobs),
            prompt_logprobs=self._prompt_logprobs() if index == 0 and choice == 0 else None,
        )

    def _prompt_logprobs(self) -> tuple[PositionLogprobs, ...] | None:
        top = self._request.sampling.prompt_logprobs
        return None if top is None else tuple(made_up_logprobs(token, top) for token in self._request.prompt[1:])

    def cancel(self, choice: int | None = None) -> None:
        for gone in list(self._next) if choice is None else [choice]:
            self._mesh.cancelled.add((self.request_id, gone))
            self._next.pop(gone, None)
        self._wake.set()

    async def close(self) -> None:
        self.cancel()
        self._mesh.open.pop(self.request_id, None)


def made_up_logprobs(token: int, top: int) -> PositionLogprobs:
    """The chosen token is always the second best."""
    others = itertools.islice((other for other in range(40, 80) if other != token), max(top, 1))
    ranked = [next(others), token, *others][:top]
    return PositionLogprobs(logprob=-0.5, rank=2, top=tuple((other, -0.25 * (place + 1)) for place, other in enumerate(ranked)))
