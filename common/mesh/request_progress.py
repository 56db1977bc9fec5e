"""A request as the gateway that owns it knows it: what its record shows, and all its tokens so far.

The tokens are kept until the end, so that a client may come back, or a second one join, and read from any token on. They
are bounded by `max_tokens` a choice.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from common.ports.generation import GenerationRequest, TokenEvent
from common.protocol.request_record import RequestRecord
from common.values.errors import RequestFailed, SegueError
from common.values.ids import ModelKey, RequestId, WorkerId
from common.values.request_account import RequestAccount
from common.values.tokens import Ending, NewTokens, PositionLogprobs

CancelInMesh = Callable[[RequestId, int | None], None]


@dataclass(slots=True)
class ChoiceTokens:
    """`logprobs` is as long as `tokens` where they were asked for, else empty."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[PositionLogprobs, ...] | None = None
    ending: Ending | None = None

    def extend(self, new: NewTokens) -> None:
        self.tokens.extend(new.tokens)
        self.logprobs.extend(new.logprobs)
        if new.prompt_logprobs is not None:  # those of a prompt of one token are empty
            self.prompt_logprobs = new.prompt_logprobs
        self.ending = new.ending or self.ending

    def whole(self) -> NewTokens:
        return NewTokens(
            first=0,
            tokens=tuple(self.tokens),
            logprobs=tuple(self.logprobs),
            prompt_logprobs=self.prompt_logprobs,
            ending=self.ending,
        )

    def events(self, choice: int, first: int) -> list[TokenEvent]:
        """From token `first` on; an ending without a token of its own is an event of its own."""
        last = len(self.tokens) - 1
        events = [
            TokenEvent(
                choice=choice,
                index=index,
                token=self.tokens[index],
                logprobs=self.logprobs[index] if index < len(self.logprobs) else None,
                prompt_logprobs=self.prompt_logprobs if index == 0 else None,
                ending=self.ending if index == last else None,
            )
            for index in range(first, last + 1)
        ]
        if not events and self.ending is not None:
            return [TokenEvent(choice=choice, index=first, ending=self.ending)]
        return events


class RequestProgress:
    """`cancel_in_mesh` ends a choice, or all. `epoch`, `attempt` and the workers are those of its record. `unread_since` is
    when the last reader of a request that lingers left; `account` is given at its end."""

    def __init__(
        self,
        request: GenerationRequest,
        model: ModelKey,
        *,
        cancel_in_mesh: CancelInMesh,
        clock: Callable[[], float],
    ) -> None:
        self.request = request
        self.model = model
        self.epoch = 1
        self.attempt = 0
        self.worker: WorkerId | None = None
        self.decode_worker: str | None = None
        self.account: RequestAccount | None = None
        self.lingers = request.lingers
        self.choices = [ChoiceTokens() for _ in range(request.choices)]
        self.started = clock()
        self.first_token: float | None = None
        self.unread_since: float | None = None
        self.is_recorded = False
        self.is_cancelled = False
        self.is_over = False
        self.error: SegueError | None = None
        self._cancel_in_mesh = cancel_in_mesh
        self._clock = clock

    @property
    def request_id(self) -> RequestId:
        return self.request.request_id

    @property
    def tokens(self) -> int:
        return sum(len(choice.tokens) for choice in self.choices)

    def taken_over(self, record: RequestRecord, *, epoch: int, attempt: int) -> None:
        """The record is ours from now on."""
        self.epoch, self.attempt = epoch, attempt
        self.worker, self.decode_worker = record.worker, record.decode_worker
        self.is_recorded = True

    def placed(self, attempt: int, worker: WorkerId, decode_worker: str | None) -> None:
        self.attempt, self.worker, self.decode_worker = attempt, worker, decode_worker

    def cancel(self, choice: int | None) -> None:
        if self.is_over:
            return
        self.is_cancelled = self.is_cancelled or choice is None
        self._cancel_in_mesh(self.request_id, choice)

    def unread(self, *, accepted: bool) -> None:
        """The last reader has left: that ends the request, or lets it linger."""
        if self.is_over:
            return
        if self.lingers and accepted:
            self.unread_since = self._clock()
        else:
            self.cancel(None)

    def deliver(self, choice: int, new: NewTokens) -> None:
        if self.first_token is None and new.tokens:
            self.first_token = self._clock()
        self.choices[choice].extend(new)

    def finish(self, error: SegueError | None) -> bool:
        """The one end; a second one changes nothing (False). Who still reads a cancelled request is told so."""
        if self.is_over:
            return False
        self.is_over = True
        self.error = error
        if error is None and self.is_cancelled:
            self.error = RequestFailed("the request was cancelled", code="cancelled", status=409)
        return True


def recorded_generation(request_id: RequestId, record: RequestRecord) -> GenerationRequest:
    """What was asked for, from its record. Somebody knows how to come back to it, so it lingers."""
    facts = record.facts
    return GenerationRequest(
        request_id=request_id,
        model=facts.model.name,
        prompt=record.prompt,
        sampling=facts.sampling,
        choices=facts.choices,
        body=facts.body,
        salt=facts.salt,
        deadline_s=facts.deadline_s,
        tenant=facts.tenant,
        lingers=True,
        keep_prompt=facts.keep_prompt,
        idempotency=facts.idempotency,
        wanted=facts.wanted,
    )
