"""A real gateway core above real worker cores, in one random but repeatable schedule, with a broker that delays and loses,
workers that die or freeze, and connections that break.

Built on the hand-off world: what passes between workers is its business; this class adds the broker and the gateway.
Client-side laws are asserted as effects leave the gateway.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from random import Random

from common.mesh.gateway import GatewayCore
from common.mesh.gateway_effects import Accepted, Deliver, Ended, GatewayEffect, SendCancel, SendDispatch, SendReplay
from common.mesh.worker_effects import AnnounceSuspect, SendNotices, SendTokens, WorkerEffect
from common.protocol.messages import Cancel, FrameEntry, SequenceNotice, Snapshot, TokenFrame, decode_inbox, decode_token_frame, encode
from common.simulation.random_requests import draw_prompt
from common.simulation.shadow_kv import logprob_of, reference
from common.values.errors import BrokerUnavailable, NeverFits, Overloaded, RequestFailed, Unavailable
from common.values.ids import GatewayId, Incarnation, ModelKey, RequestId, WorkerId
from common.values.kv_layout import Fingerprint, KvLayout
from common.values.worker import Role, WorkerSnapshot
from tests.gateway_mail import Answer, Client, Mailbox, Question, ToGateway, ToWorker
from tests.handoff_node import BLOCK, MAX_MODEL_LEN, Node
from tests.handoff_requests import draw_sampling
from tests.handoff_world import HandoffWorld, Weather

MODEL = ModelKey("m", "1")
FINGERPRINT = Fingerprint(weights="w", dtype="float32", layout=KvLayout(layers=1, kv_heads=1, head_dim=1, block_size=BLOCK))
ROLES: tuple[Role, ...] = ("prefill", "decode", "both")
GATEWAY_TICK_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Shares of all events, but `losses`: of all messages of the broker; `poison`: how likely a request is the one that kills
    the worker which computes a certain position of it. `delay_s` is the longest a message takes."""

    cancels: float = 0.0
    breaks: float = 0.0
    losses: float = 0.0
    outages: float = 0.0
    deaths: float = 0.0
    freezes: float = 0.0
    delay_s: float = 0.2
    leaves: float = 0.0
    deadlines: bool = False
    poison: float = 0.0


CALM = Faults()


class GatewayWorld(HandoffWorld):
    """`counts` says what happened; `clients` what each client has seen."""

    def __init__(self, random: Random, *, workers: int, faults: Faults = CALM, waiting: int | None = None) -> None:
        self.faults = faults
        self.waiting = waiting
        self.clients: dict[RequestId, Client] = {}
        super().__init__(random, workers=workers, pool=(10, 18), weather=Weather(losses=faults.breaks))
        self.core = GatewayCore(gateway=GatewayId("g"), incarnation=Incarnation("i"))
        self.mail = {worker: Mailbox() for worker in self.nodes}
        self.open: list[Question] = []
        self.roles = {worker: random.choice(ROLES) for worker in self.nodes}
        self.incarnations = dict.fromkeys(self.nodes, 1)
        self.numbers = dict.fromkeys(self.nodes, 0)
        self.frozen_until = dict.fromkeys(self.nodes, 0.0)
        self.down_until = dict.fromkeys(self.nodes, 0.0)
        self.broker_back_at = 0.0
        self.broker_silent = False
        self.said_at = dict.fromkeys(self.nodes, 0.0)
        self.ticked_at = dict.fromkeys(self.nodes, 0.0)
        self.placed_now: dict[RequestId, tuple[float, int]] = {}
        for node in self.nodes.values():
            self.say_snapshot(node)
        self.flush(0.0)

    # ------------------------------------------------------------------ clients

    def start_request(self) -> None:
        if not self.broker_up and not self.broker_silent:
            return
        prompt = draw_prompt(self.random, [client.prompt for client in self.clients.values()])
        sampling = draw_sampling(self.random)
        choices = self.random.choice([1, 1, 2, 3])
        request_id = RequestId(f"r{len(self.clients)}")
        expected = {choice: reference(prompt, sampling, choice, MAX_MODEL_LEN)[0] for choice in range(choices)}
        client = Client(request_id=request_id, prompt=prompt, expected=expected, tokens={choice: [] for choice in expected})
        if self.random.random() < self.faults.poison and not self.counts["poison"]:
            self.counts["poison"] += 1
            client.poison_at = self.random.randrange(len(prompt) + 2)
        deadline = self.now + self.random.choice([0.5, 3.0]) if self.faults.deadlines and self.random.random() < 0.2 else None
        try:
            self.core.start(
                request_id=request_id,
                model=MODEL,
                prompt=prompt,
                sampling=sampling,
                choices=choices,
                salt=b"",
                deadline=deadline,
                now=self.now,
            )
        except Unavailable:
            self.counts["start_unavailable"] += 1
            return
        self.clients[request_id] = client
        self.perform_gateway()

    @property
    def running(self) -> list[Client]:
        return [client for client in self.clients.values() if not client.ends]

    def leave(self) -> None:
        """A client leaves, or a stop string ends one of its choices."""
        if not self.running:
            return
        client = self.random.choice(self.running)
        if self.random.random() < 0.5:
            client.cancelled = True
            self.counts["cancel"] += 1
            self.core.cancel(client.request_id, None, self.now)
        else:
            choice = self.random.choice(sorted(client.expected))
            client.cancelled_choices.add(choice)
            self.counts["cancel_choice"] += 1
            self.core.cancel(client.request_id, choice, self.now)
        self.perform_gateway()

    # ------------------------------------------------------------------ faults

    def die(self) -> None:
        """A worker's process ends: all state is lost; it is back, with a new incarnation, after a while."""
        alive = [worker for worker in self.nodes if self.is_up(worker)]
        if alive:
            self.counts["death"] += 1
            self.kill(self.random.choice(alive))

    def kill(self, worker: WorkerId) -> None:
        for ends in self.links:
            if worker in ends:
                self.lose(ends)
                self.links[ends].channels[worker].clear()
                self.links[ends].joined.discard(worker)
        for node in self.nodes.values():
            for entry in [pull for pull in node.pulls if pull[0].peer == worker]:
                node.pulls.remove(entry)
                node.core.on_pulled(entry[0].ticket, ["lost"] * len(entry[0].blocks), self.now)
                self.perform(node)
        self.incarnations[worker] += 1
        self.numbers[worker] = 0
        self.frozen_until[worker] = 0.0
        self.down_until[worker] = self.now + self.random.choice([0.3, 1.0, 6.0])
        self.mail[worker].to_worker.clear()
        self.nodes[worker] = self.make_node(worker)

    def freeze(self) -> None:
        awake = [worker for worker in self.nodes if self.is_awake(worker)]
        if awake:
            self.counts["freeze"] += 1
            self.frozen_until[self.random.choice(awake)] = self.now + self.random.choice([0.3, 2.0, 7.0])

    def leave_mesh(self) -> None:
        """A worker takes no new work, moves what it has, says farewell once it has nothing, and comes back as a new process."""
        staying = [worker for worker in self.nodes if self.is_awake(worker) and not self.nodes[worker].core.evacuation.leaving]
        if len(staying) < 2:
            return
        node = self.nodes[self.random.choice(staying)]
        self.counts["leave"] += 1
        node.core.drain(self.now)
        self.perform(node)
        self.say_snapshot(node)

    def farewell(self, node: Node) -> None:
        self.say_snapshot(node, gone=True)
        self.kill(node.worker)

    def cut_broker(self) -> None:
        """What is under way is lost, and nothing passes for a while. A connection that breaks fails questions at once; one
        that goes silent is noticed only by a ping."""
        self.broker_back_at = self.now + self.random.choice([0.1, 1.0, 5.0])
        self.broker_silent = self.random.random() < 0.5
        self.counts["silence" if self.broker_silent else "outage"] += 1
        for mailbox in self.mail.values():
            mailbox.to_worker.clear()
            mailbox.to_gateway.clear()
        if self.broker_silent:
            return
        questions, self.open = self.open, []
        for question in questions:
            self.broker_failed(question)
        self.perform_gateway()

    def broker_failed(self, question: Question) -> None:
        if question.dispatch is not None:
            error = BrokerUnavailable("the connection was lost")
            self.core.abort(RequestId(question.dispatch.request_id), question.dispatch.attempt, error, self.now)
        else:
            self.core.on_replay_answer(question.worker, question.items, None, self.now, broker_alive=False)

    @property
    def broker_up(self) -> bool:
        return self.now >= self.broker_back_at

    def is_up(self, worker: WorkerId) -> bool:
        return self.now >= self.down_until[worker]

    def is_awake(self, worker: WorkerId) -> bool:
        return self.is_up(worker) and self.now >= self.frozen_until[worker]

    # ------------------------------------------------------------------ schedule

    def do_something(self) -> None:
        faults, chance = self.faults, self.random.random()
        for share, act in (
            (faults.cancels, self.leave),
            (faults.breaks, self.maybe_lose),
            (faults.outages, self.cut_broker),
            (faults.deaths, self.die),
            (faults.freezes, self.freeze),
            (faults.leaves, self.leave_mesh),
        ):
            if chance < share:
                act()
                return
            chance -= share
        events = self.enabled()
        if not events or self.random.random() < 0.15:
            self.pass_time(GATEWAY_TICK_S)
        else:
            self.random.choice(events)()

    def enabled(self) -> list[Callable[[], None]]:
        """Frozen and dead workers do nothing, and nobody reaches them."""
        events: list[Callable[[], None]] = []
        for worker, node in self.nodes.items():
            if self.mail[worker].to_gateway:
                events.append(partial(self.gateway_hears, worker))
            if not self.is_awake(worker):
                continue
            if self.mail[worker].to_worker:
                events.append(partial(self.worker_hears, node))
            if node.seals:
                events.append(partial(self.seal, node))
            if node.pulls:
                events.append(partial(self.pull, node))
            if node.announcements:
                events.append(partial(self.announced, node))
            events.append(partial(self.run_step, node))
        for ends, link in self.links.items():
            for worker in sorted(worker for worker in link.joined if self.is_awake(worker)):
                if link.channels[worker]:
                    events.append(partial(self.deliver, link, ends, worker))
                elif link.broken:
                    events.append(partial(self.notice, link, ends, worker))
            if not link.joined and all(map(self.is_awake, ends)):
                events.append(partial(self.join, ends))
        return events

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.flush(self.faults.delay_s)
        for question in [question for question in self.open if self.now > question.due]:
            self.open.remove(question)
            self.counts["unanswered"] += 1
            if question.dispatch is not None:
                self.core.on_dispatch_answer(
                    RequestId(question.dispatch.request_id), question.dispatch.attempt, question.worker, None, self.now
                )
            else:
                self.core.on_replay_answer(question.worker, question.items, None, self.now, broker_alive=self.broker_up)
            self.perform_gateway()
        if not self.broker_up and not self.broker_silent:
            self.core.registry.refresh(self.now)
        self.core.on_tick(self.now)
        self.perform_gateway()
        for worker, node in self.nodes.items():
            if not self.is_awake(worker):
                self.break_silent(worker)
                continue
            if self.now - self.ticked_at[worker] >= 1.0:
                self.ticked_at[worker] = self.now
                node.core.on_tick(self.now)
                self.perform(node)
            if self.now - self.said_at[worker] >= 0.5:
                self.say_snapshot(node)
            if node.core.evacuation.leaving and node.core.idle and not (node.seals or node.pulls or node.step.busy):
                self.farewell(node)

    def break_silent(self, worker: WorkerId) -> None:
        """Peers drop a connection over which nothing came for 5 s."""
        if self.is_up(worker) and self.now - self.ticked_at[worker] > 5.0:
            for ends, link in self.links.items():
                if worker in ends and not link.broken:
                    self.lose(ends)

    def flush(self, delay_s: float) -> None:
        """No message takes longer than `delay_s`, while its receiver is awake."""
        for worker, mailbox in self.mail.items():
            while mailbox.to_worker and self.is_awake(worker) and self.now - mailbox.to_worker[0][0] >= delay_s:
                self.worker_hears(self.nodes[worker])
            while mailbox.to_gateway and self.now - mailbox.to_gateway[0][0] >= delay_s:
                self.gateway_hears(worker)

    # ------------------------------------------------------------------ messages

    def say(self, worker: WorkerId, message: ToGateway) -> None:
        if not self.broker_up or self.random.random() < self.faults.losses:
            self.counts["lost_message"] += 1
        else:
            self.mail[worker].to_gateway.append((self.now, message))

    def tell(self, worker: WorkerId, message: ToWorker) -> None:
        if self.broker_up and self.random.random() >= self.faults.losses and self.is_up(worker):
            self.mail[worker].to_worker.append((self.now, message))
        else:
            self.counts["lost_message"] += 1

    def asker(self) -> tuple[GatewayId, Incarnation]:
        """Whom a probe makes the owner."""
        return GatewayId("g"), Incarnation("i")

    def worker_hears(self, node: Node) -> None:
        _, message = self.mail[node.worker].to_worker.popleft()
        match message:
            case Cancel():
                node.core.on_cancel(message, self.now)
            case Question(dispatch=None, items=items):
                entries = tuple(node.core.on_replay(items, *self.asker()))
                self.say(node.worker, Answer(question=message, entries=entries, incarnation=str(self.incarnations[node.worker])))
            case Question(dispatch=dispatch):
                assert dispatch is not None
                decoded = decode_inbox(encode(dispatch))
                assert decoded == dispatch
                reply = node.core.on_dispatch(dispatch, self.now)
                self.counts[f"dispatch_{reply.verdict}"] += 1
                self.say(node.worker, Answer(question=message, reply=reply))
        self.perform(node)

    def gateway_hears(self, worker: WorkerId) -> None:
        _, message = self.mail[worker].to_gateway.popleft()
        match message:
            case TokenFrame():
                self.core.on_frame(decode_token_frame(encode(message)), self.now)
            case Snapshot():
                self.core.on_snapshot(message, self.now)
            case Answer():
                self.answered(message)
        self.perform_gateway()

    def answered(self, answer: Answer) -> None:
        """An answer that comes too late was given up, and is dropped."""
        question = answer.question
        if question not in self.open:
            return
        self.open.remove(question)
        if question.dispatch is None:
            self.core.on_replay_answer(
                question.worker,
                question.items,
                answer.entries,
                self.now,
                broker_alive=True,
                incarnation=Incarnation(answer.incarnation),
            )
        else:
            dispatch = question.dispatch
            self.core.on_dispatch_answer(RequestId(dispatch.request_id), dispatch.attempt, question.worker, answer.reply, self.now)

    def perform_effect(self, node: Node, effect: WorkerEffect) -> None:
        """Frames go to the broker; all else is the hand-off world's."""
        match effect:
            case SendTokens():
                self.say_frame(node, list(effect.entries), [])
            case SendNotices():
                self.say_frame(node, [], list(effect.notices))
            case AnnounceSuspect():
                self.say_frame(node, [], [effect.notice])
                super().perform_effect(node, effect)
            case _:
                super().perform_effect(node, effect)

    def say_frame(self, node: Node, entries: list[FrameEntry], notices: list[SequenceNotice]) -> None:
        incarnation = str(self.incarnations[node.worker])
        self.say(node.worker, TokenFrame(worker=node.worker, incarnation=incarnation, entries=entries, notices=notices))

    def run_step(self, node: Node) -> None:
        super().run_step(node)
        killer = self.killer_in(node)
        if killer is not None:
            killer.killed += 1
            self.counts["poisoned_death"] += 1
            self.kill(node.worker)

    def killer_in(self, node: Node) -> Client | None:
        """The request whose poison a step under way at that worker computes."""
        if self.faults.poison:
            for plan, sequences in node.engine._under_way:
                for row, sequence in zip(plan.rows, sequences, strict=True):
                    client = self.clients[sequence.job.key.request_id]
                    if client.poison_at is not None and row.start <= client.poison_at < row.start + row.count:
                        return client
        return None

    def say_snapshot(self, node: Node, *, gone: bool = False) -> None:
        worker, load = node.worker, node.core.load()
        self.said_at[worker] = self.now
        self.numbers[worker] += 1
        peers = {str(peer): "memory" for ends, link in self.links.items() for peer in ends - {worker} if worker in link.joined & ends}
        snapshot = WorkerSnapshot(
            worker=worker,
            incarnation=Incarnation(str(self.incarnations[worker])),
            model=MODEL,
            role=self.roles[worker],
            state="draining" if node.core.evacuation.leaving else "ready",
            sequence_number=self.numbers[worker],
            control_host="",
            control_port=0,
            fingerprint=FINGERPRINT,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=4,
            blocks_total=load.blocks_total,
            blocks_free=load.blocks_free,
            blocks_cached=load.blocks_cached,
            waiting=load.waiting,
            running=load.running,
            peers=peers,
        )
        message = Snapshot(snapshot=snapshot, gone=gone)
        self.say(worker, message)
        for other in self.nodes.values():
            if other is not node and self.is_awake(other.worker):
                other.core.on_peer_snapshot(message, self.now)
                self.perform(other)

    # ------------------------------------------------------------------ the gateway's effects

    def perform_gateway(self) -> None:
        for effect in self.core.take_effects():
            self.perform_gateway_effect(effect)

    def perform_gateway_effect(self, effect: GatewayEffect) -> None:
        match effect:
            case SendDispatch(worker=worker, dispatch=dispatch, within_s=within_s):
                self.check_bounded(RequestId(dispatch.request_id))
                self.ask(Question(worker=worker, due=self.now + within_s, dispatch=dispatch))
            case SendReplay(worker=worker, items=items, within_s=within_s):
                self.check_one_probe(items_of=worker, question=Question(worker=worker, due=self.now + within_s, items=items))
            case SendCancel(worker=worker, cancel=cancel):
                self.tell(worker, cancel)
            case Accepted(request_id=request_id):
                client = self.clients[request_id]
                assert not client.ends
                assert not client.accepted, "accepted twice"
                client.accepted = True
            case Deliver():
                self.delivered(effect)
            case Ended():
                self.ended(effect)

    def ask(self, question: Question) -> None:
        if not self.broker_up and not self.broker_silent:
            self.broker_failed(question)
            return
        self.open.append(question)
        self.tell(question.worker, question)

    def check_bounded(self, request_id: RequestId) -> None:
        """However many workers refuse, no request is dispatched over and over at one moment."""
        client = self.clients[request_id]
        client.dispatches += 1
        at, count = self.placed_now.get(request_id, (self.now, 0))
        count = count + 1 if at == self.now else 1
        self.placed_now[request_id] = (self.now, count)
        assert count <= len(self.nodes) + 2, "a loop of dispatches at one moment"

    def check_one_probe(self, *, items_of: WorkerId, question: Question) -> None:
        asked = {(item.request_id, item.attempt, item.choice) for other in self.open for item in other.items}
        for item in question.items:
            assert (item.request_id, item.attempt, item.choice) not in asked, f"a second probe ({items_of}) while one is under way"
        self.ask(question)

    def delivered(self, effect: Deliver) -> None:
        client, new = self.clients[effect.request_id], effect.new
        tokens = client.tokens[effect.choice]
        assert client.accepted, "tokens before it was accepted"
        assert not client.ends, "tokens after the end"
        assert effect.choice not in client.cancelled_choices | client.ended_choices, "tokens after a choice's end"
        assert new.first == len(tokens), "a gap, or a token twice"
        tokens.extend(new.tokens)
        assert tokens == client.expected[effect.choice][: len(tokens)], "another token than alone"
        positions = range(len(client.prompt) + new.first, len(client.prompt) + len(tokens))
        assert new.logprobs == tuple(map(logprob_of, positions)), "scores of other tokens"
        if new.ending is not None:
            assert tokens == client.expected[effect.choice]
            client.ended_choices.add(effect.choice)

    def ended(self, effect: Ended) -> None:
        client = self.clients[effect.request_id]
        client.ends += 1
        assert client.ends == 1, "a request ended twice"
        client.error = effect.error
        if effect.error is None and not client.cancelled:
            for choice, expected in client.expected.items():
                assert choice in client.cancelled_choices or client.tokens[choice] == expected
        if effect.error is not None:
            code = getattr(effect.error, "code", "?")
            self.counts[f"failed_{code}"] += 1
            self.check_reason(client, effect.error)

    def check_reason(self, client: Client, error: Exception) -> None:
        """A failure has a cause that really was there."""
        count = self.counts
        match error:
            case RequestFailed(code="deadline_exceeded"):
                assert self.faults.deadlines
            case RequestFailed(code="request_poisoned"):
                assert client.poison_at is not None or count["death"] + count["freeze"] + count["lost_message"] >= 2
            case Overloaded():
                assert count["dispatch_full"]
                assert not client.accepted
            case BrokerUnavailable():
                assert count["outage"] + count["silence"]
                assert not client.accepted
            case Unavailable():
                assert "is left" in str(error)
                assert count["death"] + count["freeze"] + count["silence"] + count["poisoned_death"]
            case NeverFits():
                assert count["dispatch_refused"]
            case _:
                raise AssertionError(f"no reason to fail: {error!r}")

    def make_node(self, worker: WorkerId) -> Node:
        random = self.random
        waiting = self.waiting or random.randint(3, 8)
        return Node(
            str(worker), random, random.randint(10, 18), budget=random.randint(3, 24), sequences=random.randint(2, 6), waiting=waiting
        )

    # ------------------------------------------------------------------ the end

    def finish(self, most_s: float = 400.0) -> None:
        """No more faults; every request ends, and then nothing is left anywhere."""
        self.faults = replace(CALM, deadlines=self.faults.deadlines, poison=self.faults.poison)
        until = self.now + most_s
        while self.running or not self.is_quiet():
            for _ in range(8):
                events = self.enabled()
                if events:
                    self.random.choice(events)()
            self.pass_time(GATEWAY_TICK_S)
            assert self.now < until, f"never quiet: {[c.request_id for c in self.running]}, {self.left_over()}"
        for client in self.clients.values():
            assert client.ends == 1
        for node in self.nodes.values():
            assert node.pool.held == 0
            assert not node.grants, "a grant outlives its hand-off"
        assert self.core.active == 0

    def is_quiet(self) -> bool:
        links = all(link.joined and not link.broken for link in self.links.values())
        return links and all(n.core.idle and not n.seals and not n.pulls and not n.step.busy for n in self.nodes.values())

    def left_over(self) -> list[tuple[str, object]]:
        return [(str(node.worker), node.engine.load()) for node in self.nodes.values() if not node.core.idle]
