"""Two or three worker cores, their peer connections and a gateway, in one random but repeatable schedule.

Everything that a shell would do is an event that may happen now or later: deliver a message, run a step, seal blocks, copy
blocks, lose a connection, let time pass. The gateway's laws are asserted as frames arrive.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

from common.mesh.worker_effects import (
    AnnounceSuspect,
    GrantBlocks,
    ObserveHandoff,
    PullBlocks,
    RevokeGrant,
    SealBlocks,
    SendControl,
    SendNotices,
    SendTokens,
    WorkerEffect,
)
from common.protocol.messages import (
    Cancel,
    ControlMessage,
    FrameEntry,
    ReadyBlock,
    SequenceNotice,
    Snapshot,
    decode_control,
    encode,
)
from common.simulation.random_requests import draw_prompt
from common.simulation.shadow_kv import pull_outcome
from common.values.ids import RequestId, SequenceKey, WorkerId
from common.values.sampling import SamplingParameters
from common.values.transfer import PullOutcome
from common.values.worker import WorkerState
from tests.handoff_node import Link, Node
from tests.handoff_requests import Request, draw_sampling, make_request

FAILURES: tuple[PullOutcome, ...] = ("generation", "checksum", "lost", "refused")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """What may go wrong, and how often (as shares of all events, or of all blocks for `bad_blocks`)."""

    cancels: float = 0.0
    raises: float = 0.0
    losses: float = 0.0
    drains: float = 0.0
    bad_blocks: float = 0.0


CALM = Weather()


class HandoffWorld:
    """`counts` says what happened, so that a test can assert that it tests what it should. `audible`: workers are heard as often
    as in a mesh, so that nobody takes a peer that is slow to answer for frozen."""

    def __init__(
        self,
        random: Random,
        *,
        workers: int,
        weather: Weather = CALM,
        pool: tuple[int, int] = (6, 16),
        mixed: bool = False,
        audible: bool = False,
    ) -> None:
        self.random = random
        self.audible = audible
        self.weather = weather
        self.mixed = mixed
        self.now = 100.0
        self.counts: Counter[str] = Counter()
        self.requests: dict[str, Request] = {}
        self.nodes = {
            WorkerId(name): Node(
                name,
                random,
                random.randint(*pool),
                budget=random.randint(3, 24),
                sequences=random.randint(2, 6),
                waiting=random.randint(3, 8),
            )
            for name in ("p", "d", "e")[:workers]
        }
        names = sorted(self.nodes)
        self.links = {frozenset((a, b)): Link() for a in names for b in names if a < b}
        for ends in self.links:
            self.join(ends)

    # ------------------------------------------------------------------ the gateway

    def add_request(
        self, prompt: tuple[int, ...], sampling: SamplingParameters, *, choices: int = 1, worker: str, decode: str | None
    ) -> Request:
        request = make_request(f"r{len(self.requests)}", prompt, sampling, choices)
        self.requests[request.request_id] = request
        self.place(request, WorkerId(worker), None if decode is None else WorkerId(decode))
        return request

    def add_random_request(self) -> None:
        prompt = draw_prompt(self.random, [request.prompt for request in self.requests.values()])
        sampling = draw_sampling(self.random)
        worker, decode = self.random_placement()
        self.add_request(prompt, sampling, choices=self.random.choice([1, 1, 2, 3]), worker=worker, decode=decode)

    def random_placement(self) -> tuple[WorkerId, WorkerId | None]:
        staying = [worker for worker, node in self.nodes.items() if not node.core.evacuation.leaving]
        names = sorted(staying or self.nodes, reverse=True)  # p first
        worker = self.random.choice(names) if self.mixed else names[0]
        others = [name for name in names if name != worker]
        return worker, self.random.choice([*others, *others, *others, None])  # a leaver may be named: its refusal must do

    def place(self, request: Request, worker: WorkerId, decode: WorkerId | None) -> None:
        self.nodes[worker].inbox.append(request.dispatch(worker, decode))

    def raise_attempt(self, request: Request) -> None:
        self.counts["raise"] += 1
        for worker in request.workers:
            self.nodes[worker].inbox.append(request.cancel())
        request.raise_attempt(self.random)
        request.suspect = self.random.random() < 0.5
        self.place(request, *self.random_placement())

    def cancel(self, request: Request) -> None:
        self.counts["cancel"] += 1
        request.cancelled = True
        for worker in request.workers:
            self.nodes[worker].inbox.append(request.cancel())

    def take_frame(self, node: Node, entry: FrameEntry) -> None:
        key = SequenceKey(RequestId(entry.request_id), entry.choice)
        assert entry.attempt > node.cancelled.get(key, 0), "tokens after the cancel was handled"
        request = self.requests[entry.request_id]
        if entry.attempt == request.attempt and not request.cancelled:
            choice = request.choices[entry.choice]
            emitters = len(choice.emitters)
            choice.take(node.worker, entry.new, returns=bool(self.counts["drain"]))
            self.counts["emitted_by_two"] += emitters == 1 and len(choice.emitters) == 2

    def take_notice(self, notice: SequenceNotice) -> None:
        """What is handed back is placed again, at a worker that takes it."""
        request = self.requests[notice.request_id]
        if notice.kind == "handed_back" and notice.attempt == request.attempt and not request.over:
            self.raise_attempt(request)

    # ------------------------------------------------------------------ events

    def do_something(self) -> None:
        weather, random = self.weather, self.random
        chance = random.random()
        for share, act in (
            (weather.cancels, self.maybe_cancel),
            (weather.raises, self.maybe_raise),
            (weather.losses, self.maybe_lose),
            (weather.drains, self.maybe_drain),
        ):
            if chance < share:
                act()
                return
            chance -= share
        events = self.enabled()
        if random.random() < 0.08 or not events:
            self.tick(random.choice([0.1, 0.1, 1.0]))
        else:
            random.choice(events)()

    def maybe_cancel(self) -> None:
        running = [request for request in self.requests.values() if not request.over]
        if running:
            self.cancel(self.random.choice(running))

    def maybe_raise(self) -> None:
        running = [request for request in self.requests.values() if not request.over]
        if running:
            self.raise_attempt(self.random.choice(running))

    def maybe_lose(self) -> None:
        whole = [ends for ends, link in self.links.items() if not link.broken]
        if whole:
            self.lose(self.random.choice(whole))

    def maybe_drain(self) -> None:
        """One worker takes no new work from now on; the others have heard of each other."""
        staying = sorted(worker for worker, node in self.nodes.items() if not node.core.evacuation.leaving)
        if len(staying) < 2:
            return
        leaver = self.nodes[self.random.choice(staying)]
        self.counts["drain"] += 1
        self.hear_each_other(leaver)
        leaver.core.drain(self.now)
        for node in self.nodes.values():
            self.perform(node)

    def hear_each_other(self, leaver: Node | None = None) -> None:
        for node in self.nodes.values():
            for other in self.nodes.values():
                if other is not node:
                    state: WorkerState = "draining" if other is leaver or other.core.evacuation.leaving else "ready"
                    node.core.on_peer_snapshot(Snapshot(snapshot=other.snapshot(state, self.random.random())), self.now)

    def enabled(self) -> list[Callable[[], None]]:
        events: list[Callable[[], None]] = []
        for node in self.nodes.values():
            if node.inbox:
                events.append(partial(self.deliver_inbox, node))
            if node.seals:
                events.append(partial(self.seal, node))
            if node.pulls:
                events.append(partial(self.pull, node))
            if node.announcements:
                events.append(partial(self.announced, node))
            events.append(partial(self.run_step, node))
        for ends, link in self.links.items():
            for worker in sorted(link.joined):
                if link.channels[worker]:
                    events.append(partial(self.deliver, link, ends, worker))
                elif link.broken:
                    events.append(partial(self.notice, link, ends, worker))
            if not link.joined:
                events.append(partial(self.join, ends))
        return events

    def deliver_inbox(self, node: Node) -> None:
        message = node.inbox.popleft()
        if isinstance(message, Cancel):
            node.core.on_cancel(message, self.now)
            for choice in range(3):
                key = SequenceKey(RequestId(message.request_id), choice)
                node.cancelled[key] = max(message.attempt, node.cancelled.get(key, 0))
        else:
            reply = node.core.on_dispatch(message, self.now)
            self.counts[f"dispatch_{reply.verdict}"] += 1
            request = self.requests[message.request_id]
            if request.attempt == message.attempt and not request.cancelled:
                assert reply.verdict != "stale"
                request.placed = reply.verdict == "accepted"
                if reply.verdict == "refused":
                    assert reply.code == "kv_cache_too_small"
                    self.cancel(request)
        self.perform(node)

    def announced(self, node: Node) -> None:
        node.core.on_announced(node.announcements.popleft().ticket)
        self.perform(node)

    def run_step(self, node: Node) -> None:
        if node.step.busy:
            node.core.on_step(node.step.perform(), self.now)
        else:
            plan = node.core.plan(self.now)
            if plan is not None:
                self.counts["steps"] += 1
                node.step.submit(plan)
        self.perform(node)

    def seal(self, node: Node, index: int | None = None) -> None:
        """Seals return in any order."""
        seal = node.seals.pop(self.random.randrange(len(node.seals)) if index is None else index)
        blocks = []
        for filled in seal.blocks:
            assert node.kv.generations[filled.block] == filled.generation, "a block was given away while it was sealed"
            checksum = node.kv.seal(filled.block, filled.valid)
            blocks.append(ReadyBlock(index=filled.index, block=filled.block, generation=filled.generation, checksum=checksum))
        node.core.on_sealed(seal.ticket, blocks, self.now)
        self.perform(node)

    def pull(self, node: Node) -> None:
        pull, generations = node.pulls.pop(self.random.randrange(len(node.pulls)))
        peer = self.nodes[pull.peer]
        granted = peer.grants.get(pull.reservation, {})
        mapped = self.random.random() < 0.5
        outcomes: list[PullOutcome] = []
        for block in pull.blocks:
            assert node.kv.generations[block.landing_block] == generations[block.landing_block], "a landing block was given away"
            if self.random.random() < self.weather.bad_blocks:
                node.kv.spoil(block.landing_block)
                outcomes.append(self.random.choice(FAILURES))
            elif block.source_block >= len(peer.kv.generations):
                outcomes.append("lost")  # the peer was started again since, with a smaller pool
            elif not mapped and granted.get(block.source_block) != block.generation:
                outcomes.append("refused")
            else:
                source, landing = block.source_block, block.landing_block
                outcomes.append(pull_outcome(node.kv, peer.kv, source, landing, block.generation, block.checksum))
        self.counts.update(f"block_{outcome}" for outcome in outcomes)
        node.core.on_pulled(pull.ticket, outcomes, self.now)
        self.perform(node)

    def deliver(self, link: Link, ends: frozenset[WorkerId], worker: WorkerId) -> None:
        message: ControlMessage = decode_control(link.channels[worker].popleft())
        (peer,) = ends - {worker}
        self.counts[type(message).__name__] += 1
        self.nodes[worker].core.on_control(peer, message, self.now)
        self.perform(self.nodes[worker])

    def lose(self, ends: frozenset[WorkerId]) -> None:
        """Of what is under way a first part still arrives."""
        self.counts["lose"] += 1
        link = self.links[ends]
        link.broken = True
        for channel in link.channels.values():
            for _ in range(self.random.randint(0, len(channel))):
                channel.pop()

    def notice(self, link: Link, ends: frozenset[WorkerId], worker: WorkerId) -> None:
        (peer,) = ends - {worker}
        link.joined.discard(worker)
        self.nodes[worker].core.on_peer_lost(peer, self.now)
        self.perform(self.nodes[worker])

    def join(self, ends: frozenset[WorkerId]) -> None:
        self.links[ends] = Link(channels={worker: deque() for worker in sorted(ends)}, joined=set(ends))
        for worker in sorted(ends):
            (peer,) = ends - {worker}
            self.nodes[worker].core.on_peer_joined(peer)
            self.perform(self.nodes[worker])

    def tick(self, seconds: float) -> None:
        self.now += seconds
        if self.audible:
            self.hear_each_other()
        for node in self.nodes.values():
            node.core.on_tick(self.now)
            self.perform(node)

    def perform(self, node: Node) -> None:
        """Take the core's effects; check the laws that hold after every event."""
        for effect in node.core.take_effects():
            self.perform_effect(node, effect)
        node.core.check_invariants()

    def perform_effect(self, node: Node, effect: WorkerEffect) -> None:
        match effect:
            case SendTokens(entries=entries):
                for entry in entries:
                    self.take_frame(node, entry)
            case SendNotices(notices=notices):
                for notice in notices:
                    self.counts[f"notice_{notice.kind}"] += 1
                    self.take_notice(notice)
            case AnnounceSuspect():
                self.counts["announced"] += 1
                node.announcements.append(effect)
            case SendControl(peer=peer, message=message):
                link = self.links[frozenset((node.worker, peer))]
                assert node.worker in link.joined, "a message for a peer that is not there"
                if not link.broken:
                    link.channels[peer].append(encode(message))
            case SealBlocks():
                node.seals.append(effect)
            case PullBlocks(blocks=blocks):
                self.counts["pulled"] += len(blocks)
                node.pulls.append((effect, {b.landing_block: node.kv.generations[b.landing_block] for b in blocks}))
            case GrantBlocks(reservation=reservation, blocks=granted):
                node.grants.setdefault(reservation, {}).update(granted)
            case RevokeGrant(reservation=reservation):
                node.grants.pop(reservation, None)
            case ObserveHandoff(exposed_s=exposed_s):
                assert exposed_s >= 0.0
