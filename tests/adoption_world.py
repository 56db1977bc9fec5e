"""Two gateways above one world of workers: the second one takes requests of the first over, at any point, with a higher epoch.

The first one learns of it late: from whoever tells it, from a worker that answers to the higher epoch, or when it wants to
place the request again and its record is not its own any more. What it shows its client until then must still be right.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from random import Random

from common.mesh.adoption import adopted_request, logged_tokens
from common.mesh.gateway import GatewayCore
from common.mesh.gateway_effects import Dropped, GatewayEffect, SendDispatch
from common.mesh.worker_effects import AnnounceSuspect, SendNotices, SendTokens, WorkerEffect
from common.protocol.messages import Dispatch, Snapshot
from common.protocol.request_record import RequestFacts, RequestRecord
from common.protocol.stored_log import StoredChoice
from common.values.ids import GatewayId, Incarnation, RequestId, WorkerId
from tests.gateway_mail import Answer, Client, Mailbox, Question, ToGateway
from tests.gateway_world import MODEL, Faults, GatewayWorld
from tests.handoff_node import Node

FIRST, SECOND = GatewayId("g"), GatewayId("h")
FIRST_EPOCH, SECOND_EPOCH = 1, 2


@dataclass(slots=True, kw_only=True)
class Part:
    """What belongs to one gateway."""

    core: GatewayCore
    open: list[Question] = field(default_factory=list)
    clients: dict[RequestId, Client] = field(default_factory=dict)
    mail: dict[WorkerId, Mailbox] = field(default_factory=lambda: defaultdict(Mailbox))


class AdoptionWorld(GatewayWorld):
    """`core`, `open`, `clients` and `mail` are those of the gateway whose turn it is: outside of `turn`, of the first one."""

    def __init__(self, random: Random, *, workers: int, faults: Faults) -> None:
        self.at = FIRST
        self.others = {SECOND: Part(core=GatewayCore(gateway=SECOND, incarnation=Incarnation("i")))}
        self.placed: dict[RequestId, Dispatch] = {}
        self.placed_at: dict[RequestId, WorkerId] = {}
        self.taken: set[RequestId] = set()
        self.obeys: set[tuple[WorkerId, int, str, int]] = set()
        super().__init__(random, workers=workers, faults=faults)

    @contextmanager
    def turn(self, gateway: GatewayId) -> Iterator[None]:
        """What happens within happens at that gateway."""
        before = self.at
        self._switch(gateway)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, gateway: GatewayId) -> None:
        if gateway != self.at:
            self.others[self.at] = Part(core=self.core, open=self.open, clients=self.clients, mail=self.mail)
            part = self.others.pop(gateway)
            self.core, self.open, self.clients, self.mail = part.core, part.open, part.clients, part.mail
            self.at = gateway

    # ------------------------------------------------------------------ the second gateway

    def take_over(self) -> None:
        """By what record and log show: the last placement, and some of the tokens that were made."""
        ours = [
            client
            for client in self.running
            if client.accepted and not client.cancelled and not client.cancelled_choices and client.request_id not in self.taken
        ]
        if not ours:
            return
        client = self.random.choice(ours)
        request_id = client.request_id
        last = self.placed[request_id]
        self.taken.add(request_id)
        self.counts["taken_over"] += 1
        facts = RequestFacts(model=MODEL, sampling=last.sampling, choices=len(client.expected))
        record = RequestRecord(
            state="running",
            owner=FIRST,
            epoch=FIRST_EPOCH,
            attempt=last.attempt,
            prompt=client.prompt,
            facts=facts,
            worker=self.placed_at[request_id],
            decode_worker=None if last.decode_worker is None else WorkerId(last.decode_worker),
        )
        log = {}
        for choice, tokens in client.tokens.items():
            known = tokens[: self.random.randint(0, len(tokens))]
            log[choice] = StoredChoice(attempt=last.attempt, tokens=known, logprobs=[None] * len(known))
        request = adopted_request(request_id, record, log, epoch=SECOND_EPOCH, deadline=None)
        with self.turn(SECOND):
            nothing: dict[int, list[int]] = {choice: [] for choice in client.expected}
            view = Client(request_id=request_id, prompt=client.prompt, expected=client.expected, tokens=nothing)
            view.accepted = True
            self.clients[request_id] = view
            self.core.adopt(request, logged_tokens(facts, log), self.now)
            self.perform_gateway()

    def first_hears_of_it(self, request_id: RequestId) -> None:
        self.counts["told"] += 1
        self.core.drop(request_id, self.now)
        self.perform_gateway()

    @property
    def undecided(self) -> list[RequestId]:
        """Taken over, and the first gateway goes on with it all the same."""
        return [request_id for request_id in self.taken if not self.clients[request_id].ends]

    # ------------------------------------------------------------------ what the first one does differently

    def enabled(self) -> list[Callable[[], None]]:
        told = [partial(self.first_hears_of_it, request_id) for request_id in sorted(self.undecided) if self.random.random() < 0.05]
        return [*super().enabled(), *told, *self.mail_of_the_second()]

    def mail_of_the_second(self) -> list[Callable[[], None]]:
        events: list[Callable[[], None]] = []
        for worker, mailbox in self.others[SECOND].mail.items():
            if mailbox.to_gateway:
                events.append(partial(self.at_the_second, partial(self.gateway_hears, worker)))
            if mailbox.to_worker and self.is_awake(worker):
                events.append(partial(self.at_the_second, partial(self.worker_hears, self.nodes[worker])))
        return events

    def at_the_second(self, act: Callable[[], None]) -> None:
        with self.turn(SECOND):
            act()

    def pass_time(self, seconds: float) -> None:
        super().pass_time(seconds)
        with self.turn(SECOND):
            super().pass_time(0.0)

    def cut_broker(self) -> None:
        super().cut_broker()
        with self.turn(SECOND):
            for mailbox in self.mail.values():
                mailbox.to_worker.clear()
                mailbox.to_gateway.clear()
            if not self.broker_silent:
                questions, self.open = self.open, []
                for question in questions:
                    self.broker_failed(question)
                self.perform_gateway()

    def perform_gateway_effect(self, effect: GatewayEffect) -> None:
        match effect:
            case SendDispatch(dispatch=dispatch, worker=worker):
                request_id = RequestId(dispatch.request_id)
                if self.at == FIRST and request_id in self.taken:
                    self.counts["compare_and_set_lost"] += 1
                    self.core.drop(request_id, self.now)
                    self.perform_gateway()
                    return
                self.placed[request_id], self.placed_at[request_id] = dispatch, worker
                super().perform_gateway_effect(effect)
            case Dropped(request_id=request_id):
                assert self.at == FIRST, "the last owner never loses"
                assert request_id in self.taken, "dropped without a new owner"
                self.clients[request_id].ends += 1
                assert self.clients[request_id].ends == 1
            case _:
                super().perform_gateway_effect(effect)

    # ------------------------------------------------------------------ who is meant

    def perform_effect(self, node: Node, effect: WorkerEffect) -> None:
        if isinstance(effect, SendTokens) and effect.gateway == FIRST:
            for entry in effect.entries:
                assert not self.obeys_second(node.worker, entry.request_id, entry.choice), "a frame for a gateway that has lost"
        if isinstance(effect, SendTokens | SendNotices | AnnounceSuspect):
            with self.turn(effect.gateway):
                super().perform_effect(node, effect)
        else:
            super().perform_effect(node, effect)

    def asker(self) -> tuple[GatewayId, Incarnation]:
        return self.at, Incarnation("i")

    def say(self, worker: WorkerId, message: ToGateway) -> None:
        if isinstance(message, Snapshot):
            for gateway in (FIRST, SECOND):
                with self.turn(gateway):
                    super().say(worker, message)
            return
        for entry in (message.entries or ()) if isinstance(message, Answer) else ():
            if self.at == SECOND and entry.state != "unknown":
                self.obeys.add((worker, self.incarnations[worker], entry.request_id, entry.choice))
            if self.at == FIRST and self.obeys_second(worker, entry.request_id, entry.choice):
                assert entry.state in ("adopted", "unknown"), "tokens for a gateway that has lost"
                self.counts[entry.state] += 1
        super().say(worker, message)

    def obeys_second(self, worker: WorkerId, request_id: str, choice: int) -> bool:
        """That worker has answered the higher epoch."""
        return (worker, self.incarnations[worker], request_id, choice) in self.obeys

    def kill(self, worker: WorkerId) -> None:
        super().kill(worker)
        for part in self.others.values():
            part.mail[worker].to_worker.clear()

    # ------------------------------------------------------------------ the end

    def is_quiet(self) -> bool:
        with self.turn(SECOND):
            second = not self.running and not self.core.active
        return second and super().is_quiet()

    def finish(self, most_s: float = 400.0) -> None:
        super().finish(most_s)
        with self.turn(SECOND):
            assert not self.core.active
            assert set(self.clients) == self.taken
            assert all(client.ends == 1 for client in self.clients.values())
