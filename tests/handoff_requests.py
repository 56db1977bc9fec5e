"""Requests as their gateway sees them: placed by attempts, their tokens taken as frames arrive, the stream's laws asserted."""

from dataclasses import dataclass, field
from random import Random

from common.protocol.messages import Cancel, ChoiceState, Dispatch, pack_ids
from common.simulation.shadow_kv import reference
from common.values.ids import ModelKey, WorkerId
from common.values.sampling import SamplingParameters
from common.values.tokens import Ending, NewTokens
from tests.handoff_node import MAX_MODEL_LEN


@dataclass(slots=True)
class Choice:
    """What the gateway has of one choice: its tokens before this attempt, those of this attempt by index, its end."""

    expected: list[int]
    expected_ending: Ending
    given: list[int] = field(default_factory=list)
    fresh: dict[int, int] = field(default_factory=dict)
    emitters: list[WorkerId] = field(default_factory=list)
    ending: Ending | None = None

    def tokens(self) -> list[int]:
        tokens = list(self.given)
        while len(tokens) in self.fresh:
            tokens.append(self.fresh[len(tokens)])
        return tokens

    def take(self, worker: WorkerId, new: NewTokens, *, returns: bool) -> None:
        """`returns`: where a worker leaves, what it had may come back to whom it came from."""
        assert new.first == len(self.given) + len(self.fresh), "a gap, or an index twice"
        assert len(new.logprobs) == len(new.tokens)
        self.fresh.update(enumerate(new.tokens, new.first))
        assert self.tokens() == self.expected[: len(self.tokens())], "another token than alone"
        if not self.emitters or self.emitters[-1] != worker:
            assert returns or worker not in self.emitters, "the right to emit came back"
            self.emitters.append(worker)
        if new.ending is not None:
            assert self.ending is None, "ended twice"
            assert new.ending == self.expected_ending
            assert self.tokens() == self.expected
            self.ending = new.ending

    def start_again(self, random: Random) -> None:
        """From a prefix of what has arrived: the rest is still under way, and dropped."""
        tokens = self.tokens()
        fewest = len(self.given)
        self.given = tokens[: random.randint(fewest, max(fewest, min(len(tokens), len(self.expected) - 1)))]
        self.fresh, self.emitters, self.ending = {}, [], None

    @property
    def over(self) -> bool:
        return self.ending is not None and len(self.tokens()) == len(self.expected)


@dataclass(slots=True)
class Request:
    """`placed` is False where a worker turned its dispatch away."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParameters
    choices: dict[int, Choice]
    attempt: int = 1
    workers: set[WorkerId] = field(default_factory=set)
    cancelled: bool = False
    placed: bool = True
    suspect: bool = False

    @property
    def over(self) -> bool:
        return self.cancelled or all(choice.over for choice in self.choices.values())

    def raise_attempt(self, random: Random) -> None:
        self.attempt += 1
        for choice in self.choices.values():
            if not choice.over:
                choice.start_again(random)

    def dispatch(self, worker: WorkerId, decode: WorkerId | None) -> Dispatch:
        self.workers = {worker} | ({decode} if decode is not None else set())
        self.placed = True
        return Dispatch(
            request_id=self.request_id,
            attempt=self.attempt,
            gateway="g",
            incarnation="i",
            model=ModelKey("m", "1"),
            prompt=pack_ids(self.prompt),
            choices=[ChoiceState(choice=n, tokens=list(c.given)) for n, c in self.choices.items() if not c.over],
            sampling=self.sampling,
            decode_worker=decode,
            suspect=self.suspect,
        )

    def cancel(self) -> Cancel:
        return Cancel(request_id=self.request_id, attempt=self.attempt)


def make_request(request_id: str, prompt: tuple[int, ...], sampling: SamplingParameters, choices: int) -> Request:
    expected = [reference(prompt, sampling, choice, MAX_MODEL_LEN) for choice in range(choices)]
    return Request(
        request_id=request_id,
        prompt=prompt,
        sampling=sampling,
        choices={n: Choice(expected=tokens, expected_ending=ending) for n, (tokens, ending) in enumerate(expected)},
    )


def draw_sampling(random: Random) -> SamplingParameters:
    most = random.choice([1, 2, 3, 6, 12])
    return SamplingParameters(max_tokens=most, seed=random.randint(0, 3), ignore_eos=random.random() < 0.7, logprobs=0)
