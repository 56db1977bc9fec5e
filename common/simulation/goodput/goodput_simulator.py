"""Requests through a deployment in virtual time, decided by the policies that the services run.

Events are ordered by time; of one moment arrivals come first, then looks at the deployment, prompts that are done, hand-offs
that arrive, step boundaries, each by number: a run with every step as an event and a run in closed form see the same order.
"""

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from common.policy.admission import Refused, ServedLate, decide_admission
from common.policy.fair_share import FADES_S, Fading, FairShare
from common.policy.free_placement import StreamLoad
from common.policy.output_length import OutputLengths
from common.policy.placement import choose_site
from common.policy.site_questions import (
    PlacedRequest,
    decode_outlook,
    goes_beside,
    prefill_outlook,
    prompt_seconds,
    stays_here,
    stream_seconds,
)
from common.simulation.goodput.deployment import UNBOUNDED, Deployment
from common.simulation.goodput.flight import Arrival, Flight
from common.simulation.goodput.mixing_worker import MixingWorker
from common.simulation.goodput.prefill_worker import Planned, PrefillWorker
from common.simulation.goodput.prefix_cache import SimulatedPrefixCache
from common.values.errors import InvariantBroken
from common.values.objectives import Objectives
from common.values.worker import Role

LOOK, PROMPTS_DONE, HANDED_OVER, BOUNDARY = 0, 1, 2, 3
LONGEST_OUTPUT = 1 << 20
"""A prediction may not look at what a request will make."""

Worker = PrefillWorker | MixingWorker


@dataclass(frozen=True, slots=True)
class Look:
    """Somebody looks at the deployment now, and again after `every_s`, and may change roles."""

    at_look: Callable[[float], None]
    every_s: float


_Event = tuple[float, int, int, int, Worker | Flight | Look]


class GoodputSimulator:
    """`objectives` by request class; that of "" is for classes without any. One simulator runs once."""

    def __init__(self, deployment: Deployment, objectives: Mapping[str, Objectives], rng: Random) -> None:
        self._deployment = deployment
        self._policies = deployment.policies
        self._time = deployment.step_time
        self._objectives = objectives
        self._rng = rng
        self._events: list[_Event] = []
        self._lengths = OutputLengths()
        self._shares: dict[str, FairShare] = {}
        self._turns = 0
        self._handed: dict[int, MixingWorker] = {}
        self._asked_s = 0.0
        self._wanted = Fading(0.0, 0.0)
        self._asked = 0
        self._looks_until_s = 0.0
        number = iter(range(deployment.workers))
        mixing = self._policies.free or deployment.changeable
        self._lone_tokens = lone_tokens = self._policies.chunk_tokens or UNBOUNDED
        self._prompt_sites: list[Worker] = [
            self._mixing(next(number), lone_tokens) if mixing else self._batching(next(number)) for _ in range(deployment.prefill)
        ]
        self._decode = [self._mixing(next(number)) for _ in range(deployment.decode)]
        self._prompt_sites += [self._mixing(next(number)) for _ in range(deployment.both)]
        self._prefill_only = set(self._prompt_sites[: deployment.prefill])
        prefill = deployment.prefill
        both = self._prompt_sites[prefill:]
        self._workers: list[Worker] = [*self._prompt_sites[:prefill], *self._decode, *both]
        blocks = deployment.prefix_blocks
        caching = self._workers if deployment.changeable else self._prompt_sites
        self._caches = {worker: SimulatedPrefixCache(blocks, deployment.prefix_block_tokens) for worker in caching if blocks}

    def run(self, arrivals: Sequence[Arrival], look: Look | None = None) -> list[Flight]:
        """All requests, in the order of `arrivals`, which is that of their times. `look` is called until the last has come."""
        flights: list[Flight] = []
        events = self._events
        if look is not None:
            self._looks_until_s = arrivals[-1].arrived_s if arrivals else 0.0
            heapq.heappush(events, (look.every_s, LOOK, 0, 0, look))
        before = 0.0
        for number, arrival in enumerate(arrivals):
            if arrival.arrived_s < before:
                raise ValueError("arrivals are in the order of their times")
            before = arrival.arrived_s
            while events and events[0][0] < before:
                self._happen(heapq.heappop(events))
            flight = self.flight_of(number, arrival)
            flights.append(flight)
            self._arrive(flight, before)
        while events:
            self._happen(heapq.heappop(events))
        self._check_all_ended(flights)
        return flights

    def flight_of(self, number: int, arrival: Arrival) -> Flight:
        unloaded_s = self._time.prefill.seconds(arrival.prompt_tokens)
        objectives = self._objectives.get(arrival.request_class) or self._objectives[""]
        return Flight(number, arrival, objectives, unloaded_s)

    @property
    def workers(self) -> Sequence[Worker]:
        """By number: first those that began as prefill workers, then decode workers, then colocated ones."""
        return self._workers

    def is_prefill(self, number: int) -> bool:
        return self._workers[number] in self._prefill_only

    def expected_tokens(self, arrival: Arrival, made: int = 0) -> float:
        """What is known of a request's output when it comes, or once that many tokens are made."""
        most = min(LONGEST_OUTPUT, self._deployment.kv_tokens - arrival.prompt_tokens)
        return self._lengths.predicted(arrival.request_class, most, made)

    def learn(self, request_class: str, output_tokens: int) -> None:
        """What requests of the class have made before this run."""
        self._lengths.observe(request_class, output_tokens)

    def begin_with(self, number: int, flight: Flight) -> None:
        """A request that is on that worker from the start: it decodes where it has its first token, else its prompt waits."""
        worker = self._workers[number]
        if not isinstance(worker, MixingWorker):
            raise ValueError("only workers that do both begin with something")
        if flight.first_token_s is not None:
            worker.join(flight, 0.0)
        else:
            worker.offer_prompt(flight, 0.0)

    def change_role(self, number: int, role: Role, now: float) -> None:
        """The worker takes the role for what comes. A new prefill worker gives its streams away (a hand-off each; one that finds no
        room stays), a new decode worker hands its waiting prompts back and finishes those that it has begun."""
        worker = self._workers[number]
        if not isinstance(worker, MixingWorker) or not self._deployment.changeable:
            raise ValueError("these workers keep their roles")
        if role == "prefill" and worker in self._decode:
            self._decode.remove(worker)
            self._prompt_sites.append(worker)
            self._prefill_only.add(worker)
            for flight in worker.give_away(now, self._lone_tokens):
                self._hand_over(flight, now)
        elif role == "decode" and worker in self._prefill_only:
            self._prefill_only.remove(worker)
            self._prompt_sites.remove(worker)
            self._decode.append(worker)
            for flight in worker.withdraw_prompts(now):
                self._offer(flight, now)

    def _batching(self, number: int) -> PrefillWorker:
        worker = PrefillWorker(self._deployment, self._planner(PROMPTS_DONE, number, lambda: worker))
        return worker

    def _mixing(self, number: int, lone_tokens: int | None = None) -> MixingWorker:
        planned = self._planner(BOUNDARY, number, lambda: worker)
        worker = MixingWorker(self._deployment, planned, lone_tokens=lone_tokens)
        return worker

    def _planner(self, kind: int, number: int, worker: Callable[[], Worker]) -> Planned:
        events, push = self._events, heapq.heappush

        def planned(end: float, version: int) -> None:
            push(events, (end, kind, number, version, worker()))

        return planned

    def _happen(self, event: _Event) -> None:
        now, _, _, version, subject = event
        if isinstance(subject, Look):
            subject.at_look(now)
            if now + subject.every_s <= self._looks_until_s:
                heapq.heappush(self._events, (now + subject.every_s, LOOK, 0, 0, subject))
        elif isinstance(subject, Flight):
            self._handed.pop(subject.number).join(subject, now)
        elif version != subject.version:
            return
        elif isinstance(subject, PrefillWorker):
            for flight in subject.step_ended(now):
                self._remember(flight, subject)
                if self._deployment.first_token_counts and flight.arrival.output_tokens == 1:
                    self._end(flight, now)
                else:
                    self._hand_over(flight, now)
        else:
            self._pass_boundary(subject, now)

    def _arrive(self, flight: Flight, now: float) -> None:
        arrival = flight.arrival
        if arrival.prompt_tokens + arrival.output_tokens > self._deployment.kv_tokens:
            raise ValueError(f"request {flight.number} never fits: its KV is larger than a worker's")
        chosen, cost_s = self._choose_prompt_site(flight, now)
        if self._policies.late is not None and self._refuses(flight, cost_s, now):
            return
        self._begin_share(flight)
        self._wanted.add(flight.unloaded_s, now)
        if self._policies.free and self._decode and self._goes_beside(flight, cost_s, now):
            return
        self._take_prompt(chosen, flight, now)

    def _offer(self, flight: Flight, now: float) -> None:
        """A request that was taken before is placed anew."""
        self._take_prompt(self._choose_prompt_site(flight, now)[0], flight, now)

    def _take_prompt(self, worker: Worker, flight: Flight, now: float) -> None:
        if isinstance(worker, PrefillWorker):
            worker.offer(flight, now)
        else:
            flight.split = worker in self._prefill_only
            worker.offer_prompt(flight, now)

    def _choose_prompt_site(self, flight: Flight, now: float) -> tuple[Worker, float]:
        """And the predicted seconds until it is computed there."""
        arrival, caches = flight.arrival, self._caches
        cached = [caches[site].cached_tokens(arrival.prefix, arrival.prompt_tokens) for site in self._prompt_sites] if caches else []

        def cost(site: int) -> float:
            return self._prompt_cost_s(self._prompt_sites[site], flight, cached[site] if cached else 0, now)

        def waiting(site: int) -> int:
            worker = self._prompt_sites[site]
            return worker.waiting if isinstance(worker, PrefillWorker) else worker.prompts + worker.streams

        self._turns += 1
        chosen = choose_site(
            self._policies.prefill_rule,
            len(self._prompt_sites),
            cost=cost,
            waiting=waiting,
            turn=self._turns - 1,
            draws=self._rng,
        )
        flight.cached_tokens = cached[chosen] if cached else 0
        return self._prompt_sites[chosen], cost(chosen)

    def _prompt_cost_s(self, worker: Worker, flight: Flight, cached: int, now: float) -> float:
        tokens = flight.arrival.prompt_tokens
        if isinstance(worker, MixingWorker):
            load = worker.load_at(now, flight)
            return prompt_seconds(self._time, load, tokens=tokens, cached=cached, step_tokens=worker.step_tokens, mixes=True)
        load = StreamLoad(sequences=0, kv_tokens=0.0, slack_s=math.inf, queue_s=worker.queue_s(flight, now))
        transfer_s = self._deployment.transfer.seconds(tokens)
        return prompt_seconds(self._time, load, tokens=tokens, cached=cached, step_tokens=1, mixes=False, transfer_s=transfer_s)

    def _goes_beside(self, flight: Flight, elsewhere_s: float, now: float) -> bool:
        """Free placement: prefilled on the worker that will decode it."""
        worker = self._best_decode(flight, now)
        if not goes_beside(
            self._time,
            worker.load_with_slack(now, flight),
            self._placed(flight),
            cached=0,
            step_tokens=worker.step_tokens,
            elsewhere_s=elsewhere_s,
            room_tokens=worker.room_tokens,
        ):
            return False
        flight.split = False
        flight.cached_tokens = 0
        worker.offer_prompt(flight, now)
        return True

    def _refuses(self, flight: Flight, cost_s: float, now: float) -> bool:
        late = self._policies.late
        worker = self._best_decode(flight, now) if self._decode else self._prompt_sites[0]
        if late is None or not isinstance(worker, MixingWorker):
            return False
        load = self._streams_at(worker, now)
        step_s = self._time.decode.seconds(load.sequences + 1, load.kv_tokens)
        decode = decode_outlook(
            load,
            left_s=0.5 * self._predicted_output(flight) * step_s,
            arrivals_per_s=self._asked / now if now > 0.0 else 0.0,
            workers=len(self._decode) or len(self._prompt_sites),
        )
        utilisation = self._asked_s / (now * len(self._prompt_sites)) if now > 0.0 else 0.0
        prefill = prefill_outlook(cost_s, flight.unloaded_s, utilisation=utilisation)
        decision = decide_admission(
            self._time.decode, prefill, decode, flight.objectives, context_tokens=flight.arrival.prompt_tokens, late=late
        )
        if isinstance(decision, Refused):
            flight.refused = True
            return True
        flight.gives_way = isinstance(decision, ServedLate)
        self._asked += 1
        self._asked_s += prefill.work_s
        return False

    def _pass_boundary(self, worker: MixingWorker, now: float) -> None:
        events = worker.boundary(now)
        for flight in events.ended:
            self._end(flight, now)
        for flight in events.prefilled:
            self._remember(flight, worker)
            if self._deployment.first_token_counts and flight.arrival.output_tokens == 1:
                worker.hand_over(flight)
                self._end(flight, now)
            elif worker in self._prefill_only and not (self._policies.free and self._stays(worker, flight, now)):
                worker.hand_over(flight)
                self._hand_over(flight, now)
            else:
                flight.split = False
                worker.decode_here(flight, now)
        for flight in events.leaving:
            self._give_to_another(worker, flight, now)
        worker.plan(now)

    def _give_to_another(self, worker: MixingWorker, flight: Flight, now: float) -> None:
        there = self._best_decode(flight, now)
        if flight.arrival.prompt_tokens + flight.arrival.output_tokens <= there.room_tokens:
            self._hand_over(flight, now)
        else:
            worker.keep(flight, now)

    def _stays(self, worker: MixingWorker, flight: Flight, now: float) -> bool:
        there = self._best_decode(flight, now)
        return stays_here(
            self._time,
            worker.load_with_slack(now),
            self._placed(flight),
            there_s=self._decode_cost_s(there, self._placed(flight), now),
            transfer_s=self._deployment.transfer.seconds(flight.arrival.prompt_tokens),
            room_tokens=worker.room_tokens + flight.arrival.prompt_tokens + flight.arrival.output_tokens,
            prompts_wait=worker.prompts > 0,
            prompts_asked=self._asked_of_prefill(now),
        )

    def _asked_of_prefill(self, now: float) -> float:
        """The share of the prefill workers' time that prompts have wanted lately."""
        return self._wanted.at_time(now) / (FADES_S * len(self._prompt_sites))

    def _hand_over(self, flight: Flight, now: float) -> None:
        worker = self._best_decode(flight, now)
        transfer_s = self._deployment.transfer.seconds(flight.arrival.prompt_tokens + flight.decoded_steps)
        if transfer_s > 0.0:
            self._handed[flight.number] = worker
            heapq.heappush(self._events, (now + transfer_s, HANDED_OVER, flight.number, 0, flight))
        else:
            worker.join(flight, now)

    def _best_decode(self, flight: Flight, now: float) -> MixingWorker:
        sites = self._decode
        if len(sites) == 1:
            return sites[0]
        placed = self._placed(flight)
        chosen = choose_site(
            self._policies.decode_rule,
            len(sites),
            cost=lambda site: self._decode_cost_s(sites[site], placed, now),
            waiting=lambda site: sites[site].streams,
            turn=flight.number,
            draws=self._rng,
        )
        return sites[chosen]

    def _decode_cost_s(self, worker: MixingWorker, placed: PlacedRequest, now: float) -> float:
        return stream_seconds(self._time, self._streams_at(worker, now), placed, room_tokens=worker.room_tokens)

    def _streams_at(self, worker: MixingWorker, now: float) -> StreamLoad:
        """Those that wait for room there included."""
        return StreamLoad(sequences=worker.streams, kv_tokens=worker.kv_tokens_at(now), slack_s=math.inf)

    def _placed(self, flight: Flight) -> PlacedRequest:
        return PlacedRequest(
            prompt_tokens=flight.arrival.prompt_tokens,
            output_tokens=self._predicted_output(flight),
            ttft_s=flight.objectives.ttft_for(flight.unloaded_s),
            tpot_s=flight.objectives.tpot_s,
        )

    def _predicted_output(self, flight: Flight) -> float:
        return self.expected_tokens(flight.arrival)

    def _remember(self, flight: Flight, worker: Worker) -> None:
        if (cache := self._caches.get(worker)) is not None:
            cache.computed(flight.arrival.prefix, flight.arrival.prompt_tokens)

    def _end(self, flight: Flight, now: float) -> None:
        flight.ended_s = now
        arrival = flight.arrival
        self._lengths.observe(arrival.request_class, arrival.output_tokens)
        if self._policies.share_allowance is not None:
            self._shares[arrival.request_class].end(arrival.key, arrival.output_tokens, now)

    def _begin_share(self, flight: Flight) -> None:
        """Classes do not compete: each has its own account of its keys."""
        allowance = self._policies.share_allowance
        if allowance is None:
            return
        arrival = flight.arrival
        if arrival.request_class not in self._shares:
            self._shares[arrival.request_class] = FairShare(allowance)
        shares = self._shares[arrival.request_class]
        flight.gives_way |= shares.begin(arrival.key, arrival.prompt_tokens, arrival.arrived_s)

    def _check_all_ended(self, flights: Sequence[Flight]) -> None:
        """Law 1 of the mesh, here too."""
        lost = [flight.number for flight in flights if flight.ended_s is None and not flight.refused]
        if lost or self._handed:
            raise InvariantBroken(f"requests without an end: {lost[:5]}")
        if not all(worker.is_empty for worker in self._workers if isinstance(worker, MixingWorker)):
            raise InvariantBroken("a worker counts tokens of requests that have ended")
