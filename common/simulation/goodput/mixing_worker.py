"""A worker that decodes, and mixes chunks of prompts into its steps where it is given prompts.

Given none it is a decode worker; given all, a colocated one. Steps run in closed form between the moments at which somebody
joins, leaves or a prompt's chunk changes; who comes meanwhile gets in at the next step's boundary, as on a real worker.
"""

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from common.policy.free_placement import StreamLoad, stream_slack_s
from common.policy.prefill_queue import PrefillQueue
from common.policy.step_time import PrefillTime
from common.simulation.goodput.deployment import Deployment
from common.simulation.goodput.flight import Flight
from common.simulation.goodput.prefill_worker import Planned, queued_prompt
from common.simulation.goodput.step_run import StepRun


class BoundaryEvents(NamedTuple):
    """Of one boundary: requests that ended, requests whose prompt is computed (their room here is still reserved), and streams
    that this worker should give to another one (their room is free)."""

    ended: list[Flight]
    prefilled: list[Flight]
    leaving: list[Flight]


class _Prompt:
    __slots__ = ("chunk", "done", "flight", "tokens")

    def __init__(self, flight: Flight) -> None:
        self.flight = flight
        self.tokens = flight.arrival.prompt_tokens
        self.done = flight.cached_tokens
        self.chunk = 0

    def left_s(self, time: PrefillTime, steps: int) -> float:
        """Work left after that many steps of the current run."""
        done = self.done + steps * self.chunk
        return time.chunk_s(self.tokens - done, done)


class MixingWorker:
    """`lone_tokens`: positions of a prompt in a step while nothing is decoded here; None: as many as of any step. A prefill worker
    that may also decode has no stream to protect until one stays: until then it takes the batches of one that only computes
    prompts, and long prompts whole."""

    def __init__(self, deployment: Deployment, planned: Planned, *, lone_tokens: int | None = None) -> None:
        self._lone_tokens = lone_tokens
        self._time = deployment.step_time
        self._deployment = deployment
        self._extra_step = not deployment.first_token_counts
        self._planned = planned
        self._steps_done = 0
        self._leaves: list[tuple[int, int, Flight]] = []
        self._waiting: deque[Flight] = deque()
        self._queue = PrefillQueue(deployment.policies.order, deployment.step_time.prefill, deployment.batch)
        self._queued: dict[int, Flight] = {}
        self._prompts: list[_Prompt] = []
        self._run: StepRun | None = None
        self._reserved = 0
        self._sequences = 0
        self._kv_tokens = 0
        self._queued_room = 0
        self._blocked = False
        self._gives_away = False
        self.version = 0

    @property
    def streams(self) -> int:
        """Requests that decode here or are waiting to."""
        return self._sequences + len(self._waiting)

    @property
    def prompts(self) -> int:
        return len(self._queued) + len(self._prompts)

    @property
    def is_empty(self) -> bool:
        """Nobody is here, and nobody's room or tokens are still counted."""
        return not (self.streams or self.prompts or self._reserved or self._queued_room or self._kv_tokens)

    @property
    def step_tokens(self) -> int:
        """The most positions of a step now."""
        return self._deployment.step_tokens if self._lone_tokens is None or self._sequences else self._lone_tokens

    @property
    def room_tokens(self) -> int:
        """Not yet promised to anybody."""
        return self._deployment.kv_tokens - self._reserved - self._queued_room

    def kv_tokens_at(self, now: float) -> int:
        """Cached tokens that a step reads, those of waiting requests included."""
        grown = self._run.done_before(now) * self._sequences if self._run is not None else 0
        return self._kv_tokens + grown + sum(flight.arrival.prompt_tokens for flight in self._waiting)

    def prompt_queue_s(self, now: float, flight: Flight | None = None) -> float:
        """Seconds of prompt work in front of that request's (None: of all), without the decode rows beside it."""
        prefill = self._time.prefill
        begun = 0.0
        if self._run is not None and self._prompts:
            steps = self._run.done_before(now)
            if not self._sequences:
                steps += 1
                begun = max(0.0, self._run.time_at(steps) - now)
            begun += sum(prompt.left_s(prefill, steps) for prompt in self._prompts)
        if flight is None or not self._queued:
            return begun + self._queue.work_s
        return begun + self._queue.ahead_s(queued_prompt(flight, prefill), now)

    def streams_at(self, now: float) -> Iterator[tuple[Flight, int]]:
        """Requests that decode here or wait to, each with the tokens that it has made."""
        steps = self._steps_done + (self._run.done_before(now) if self._run is not None else 0)
        for leaves, _, flight in self._leaves:
            yield flight, flight.arrival.output_tokens - (leaves - steps)
        for flight in self._waiting:
            yield flight, flight.decoded_steps + 1

    def load_at(self, now: float, flight: Flight | None = None) -> StreamLoad:
        """What runs here, and the prompts in front of that request's; no stream's slack is looked at."""
        return StreamLoad(
            sequences=self._sequences,
            kv_tokens=self.kv_tokens_at(now),
            slack_s=float("inf"),
            queue_s=self.prompt_queue_s(now, flight),
        )

    def load_with_slack(self, now: float, flight: Flight | None = None) -> StreamLoad:
        """With the least slack of any stream here, at the current step time: looks at each of them."""
        load = self.load_at(now, flight)
        step_s = self._time.decode.seconds(load.sequences, load.kv_tokens)
        steps = self._steps_done + (self._run.done_before(now) if self._run is not None else 0)
        slack_s = load.slack_s
        for leaves, _, stream in self._leaves:
            left = leaves - steps
            began = now if stream.first_token_s is None else stream.first_token_s
            decoded = stream.arrival.output_tokens - left
            slack = stream_slack_s(tpot_s=stream.objectives.tpot_s, decoded=decoded, spent_s=now - began, left=left, step_s=step_s)
            slack_s = min(slack_s, slack)
        return replace(load, slack_s=slack_s)

    def join(self, flight: Flight, now: float) -> None:
        """Its KV has arrived: it decodes from the next boundary on at which there is room."""
        self._blocked = False
        self._waiting.append(flight)
        self._queued_room += self._need(flight)
        self._wake(now)

    def offer_prompt(self, flight: Flight, now: float) -> None:
        """To be prefilled here, in chunks."""
        self._blocked = False
        self._queued[flight.number] = flight
        self._queued_room += self._need(flight)
        self._queue.push(queued_prompt(flight, self._time.prefill))
        self._wake(now)

    def decode_here(self, flight: Flight, now: float) -> None:
        """A request that was prefilled here goes on here. Only between `boundary` and `plan`."""
        self._start_stream(flight, now)

    def keep(self, flight: Flight, now: float) -> None:
        """A stream that should leave and found no room elsewhere goes on here. Only between `boundary` and `plan`."""
        self._reserved += self._need(flight)
        self._start_stream(flight, now)

    def hand_over(self, flight: Flight) -> None:
        """A request that was prefilled here goes elsewhere, or has ended with its first token."""
        self._reserved -= self._need(flight)

    def give_away(self, now: float, lone_tokens: int) -> list[Flight]:
        """It is a prefill worker from now on: its streams leave at the next boundary, those that wait for room at once."""
        self._lone_tokens = lone_tokens
        waiting = list(self._waiting)
        self._waiting.clear()
        self._queued_room -= sum(self._need(flight) for flight in waiting)
        self._gives_away = bool(self._sequences)
        if self._gives_away:
            self._wake(now)
        return waiting

    def withdraw_prompts(self, now: float) -> list[Flight]:
        """It is a decode worker from now on: prompts that wait here and are not begun are to be placed anew."""
        self._lone_tokens = None
        withdrawn = []
        while batch := self._queue.next_batch(now, alone=True):
            withdrawn += [self._queued.pop(queued.handle) for queued in batch]
        self._queued_room -= sum(self._need(flight) for flight in withdrawn)
        self._blocked = False
        return withdrawn

    def boundary(self, now: float) -> BoundaryEvents:
        """The planned steps are over. Call `plan` once what became of the prefilled requests is decided."""
        run, self._run = self._run, None
        steps = run.end if run is not None else 0
        self._steps_done += steps
        self._kv_tokens += steps * self._sequences
        ended = []
        while self._leaves and self._leaves[0][0] <= self._steps_done:
            flight = heapq.heappop(self._leaves)[2]
            flight.ended_s = now
            self._sequences -= 1
            self._kv_tokens -= flight.arrival.prompt_tokens + 1 + self._steps_of(flight)
            self._reserved -= self._need(flight)
            ended.append(flight)
        prefilled = self._advance_prompts(steps, now) if self._prompts else []
        leaving = self._let_streams_go() if self._gives_away else []
        self._blocked = self._blocked and not ended and not prefilled and not leaving
        return BoundaryEvents(ended, prefilled, leaving)

    def plan(self, now: float) -> None:
        """Let in who waits, and run until something changes."""
        while self._waiting and self._admits(self._waiting[0]):
            flight = self._waiting.popleft()
            self._queued_room -= self._need(flight)
            self._reserved += self._need(flight)
            self._start_stream(flight, now)
        chunk_steps = self._give_chunks(now) if self._prompts or self._queued else 0
        self.version += 1
        if not chunk_steps and not self._sequences:
            self._run = None
            return
        first_s, growth_s = self._pace()
        end = self._leaves[0][0] - self._steps_done if self._sequences else chunk_steps
        if chunk_steps:
            end = min(end, chunk_steps)
        if self._deployment.step_by_step:
            end = 1
        self._run = StepRun(now, first_s, growth_s, end)
        self._planned(self._run.time_at(end), self.version)

    def _wake(self, now: float) -> None:
        """Somebody came: cut the run at the next boundary."""
        run = self._run
        if run is None:
            self.plan(now)
            return
        steps = run.next_boundary(now)
        if steps < run.end and self._lets_somebody_in():
            run.end = steps
            self.version += 1
            self._planned(run.time_at(steps), self.version)

    def _let_streams_go(self) -> list[Flight]:
        self._gives_away = False
        leaving = []
        for leaves, _, flight in sorted(self._leaves, key=lambda entry: entry[:2]):
            flight.decoded_steps = self._steps_of(flight) - (leaves - self._steps_done)
            self._kv_tokens -= flight.arrival.prompt_tokens + 1 + flight.decoded_steps
            self._reserved -= self._need(flight)
            leaving.append(flight)
        self._leaves.clear()
        self._sequences = 0
        return leaving

    def _lets_somebody_in(self) -> bool:
        return self._gives_away or bool(self._queued) or bool(self._waiting and self._admits(self._waiting[0]))

    def _admits(self, flight: Flight) -> bool:
        fits = self._reserved + self._need(flight) <= self._deployment.kv_tokens
        return fits and self._sequences + len(self._prompts) < self._deployment.max_sequences

    def _need(self, flight: Flight) -> int:
        return flight.arrival.prompt_tokens + flight.arrival.output_tokens

    def _steps_of(self, flight: Flight) -> int:
        return flight.arrival.output_tokens - 1 + self._extra_step

    def _start_stream(self, flight: Flight, now: float) -> None:
        flight.decoding_s = now
        self._sequences += 1
        self._kv_tokens += flight.arrival.prompt_tokens + 1 + flight.decoded_steps
        steps_left = self._steps_of(flight) - flight.decoded_steps
        heapq.heappush(self._leaves, (self._steps_done + steps_left, flight.number, flight))

    def _give_chunks(self, now: float) -> int:
        """Share a step's positions among prompts, begun ones first; for how many steps the shares stay the same."""
        if self._lone_tokens is not None and not self._sequences:
            return self._give_batch(now, self._lone_tokens)
        budget = max(1, self.step_tokens - self._sequences)
        for prompt in self._prompts:
            prompt.chunk = min(budget, prompt.tokens - prompt.done)
            budget -= prompt.chunk
        for prompt in self._let_prompts_in(now, budget):
            prompt.chunk = min(budget, prompt.tokens - prompt.done)
            budget -= prompt.chunk
            self._prompts.append(prompt)
        return self._steps_alike()

    def _give_batch(self, now: float, most: int) -> int:
        """As a prefill worker does: a batch, and no other before it is computed."""
        if not self._prompts:
            self._prompts.extend(self._let_batch_in(now))
        for prompt in self._prompts:
            prompt.chunk = min(most, prompt.tokens - prompt.done)
        return self._steps_alike()

    def _steps_alike(self) -> int:
        served = [prompt for prompt in self._prompts if prompt.chunk]
        if len(served) != 1:
            return len(served[:1])
        (alone,) = served
        return max(1, (alone.tokens - alone.done) // alone.chunk)

    def _let_prompts_in(self, now: float, budget: int) -> Iterator[_Prompt]:
        """As long as there is budget and room.

        Where the first one does not fit, none is let in until somebody has come or left: the order may change with time alone,
        but a small prompt that slips past a large one keeps it waiting for ever.
        """
        while budget > 0 and not self._blocked and (head := self._queue.peek(now)) is not None:
            if not self._admits(self._queued[head.handle]):
                self._blocked = True
                return
            self._queue.next_batch(now, alone=True)
            prompt = self._begin_prompt(head.handle, now)
            budget -= min(budget, prompt.tokens - prompt.done)
            yield prompt

    def _let_batch_in(self, now: float) -> Iterator[_Prompt]:
        if self._blocked:
            return
        batch = self._queue.next_batch(now)
        for index, queued in enumerate(batch):
            if not self._admits(self._queued[queued.handle]):
                for left in batch[index:]:
                    self._queue.push(left)
                self._blocked = True
                return
            yield self._begin_prompt(queued.handle, now)

    def _begin_prompt(self, handle: int, now: float) -> _Prompt:
        flight = self._queued.pop(handle)
        self._queued_room -= self._need(flight)
        self._reserved += self._need(flight)
        flight.prefill_started_s = now
        return _Prompt(flight)

    def _pace(self) -> tuple[float, float]:
        """The first step's time and how much each next one takes more."""
        prefill, decode = self._time.prefill, self._time.decode
        first_s = growth_s = 0.0
        if self._sequences:
            line = decode.line_at(self._sequences)
            first_s = line.seconds(self._sequences, self._kv_tokens)
            growth_s = line.per_kv_token_s * self._sequences
            if self._prompts:
                first_s += max(0.0, prefill.base_s - line.base_s)
        else:
            first_s = prefill.base_s
        for prompt in self._prompts:
            if prompt.chunk:
                first_s += prefill.chunk_s(prompt.chunk, prompt.done)
                growth_s += prefill.per_pair_s * prompt.chunk * prompt.chunk
        return first_s, growth_s

    def _advance_prompts(self, steps: int, now: float) -> list[Flight]:
        finished = []
        for prompt in self._prompts:
            prompt.done += steps * prompt.chunk
            prompt.chunk = 0
            if prompt.done == prompt.tokens:
                prompt.flight.first_token_s = now
                finished.append(prompt.flight)
        if finished:
            self._prompts = [prompt for prompt in self._prompts if prompt.done < prompt.tokens]
        return finished
