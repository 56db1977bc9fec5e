"""Two or three worker cores, their peer connections and a gateway, in one random but repeatable schedule.

Everything that a shell would do is an event that may happen now or later: deliver a message, run a step, seal blocks, copy
blocks, lose a connection, let time pass. The gateway's laws are asserted as frames arrive; `finish` lets everything
happen that is still due and asserts that nothing is left behind.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random

from common.mesh.sequence_engine import SequenceEngine
from common.mesh.worker import WorkerCore, WorkerLimits
from common.mesh.worker_effects import GrantBlocks, PullBlocks, RevokeGrant, SealBlocks, SendControl, SendTokens
from common.policy.batching import StepLimits
from common.policy.block_pool import BlockPool
from common.protocol.messages import (
    Cancel,
    ChoiceState,
    ControlMessage,
    Dispatch,
    FrameEntry,
    ReadyBlock,
    ReplayItem,
    SequenceState,
    decode_control,
    encode,
    pack_ids,
)
from common.values.ids import ModelKey, RequestId, ReservationId, SequenceKey, WorkerId
from common.values.kv_layout import Fingerprint, KvLayout
from common.values.sampling import SamplingParameters
from common.values.tokens import Ending
from common.values.transfer import PullOutcome
from tests.shadow_kv import EOS, VOCABULARY, ShadowKv, ShadowStep, pull_outcome, reference

BLOCK = 4
MAX_MODEL_LEN = 36
FAILURES: tuple[PullOutcome, ...] = ("generation", "checksum", "lost", "refused")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """What may go wrong, and how often (as shares of all events, or of all blocks for `bad_blocks`)."""

    cancels: float = 0.0
    raises: float = 0.0
    losses: float = 0.0
    bad_blocks: float = 0.0


CALM = Weather()


class Node:
    """One worker and the outside that its effects reach."""

    def __init__(self, name: str, random: Random, blocks: int, *, budget: int, sequences: int, waiting: int) -> None:
        self.worker = WorkerId(name)
        self.kv = ShadowKv(blocks, BLOCK)
        self.step = ShadowStep(self.kv)
        self.pool = BlockPool(blocks, self.kv.generations)
        self.engine = SequenceEngine(
            fingerprint=Fingerprint(weights="w", dtype="float32", layout=KvLayout(layers=1, kv_heads=1, head_dim=1, block_size=BLOCK)),
            pool=self.pool,
            limits=StepLimits(max_tokens=budget, max_sequences=sequences),
            max_model_len=MAX_MODEL_LEN,
            eos_token_ids=EOS,
            max_waiting=waiting,
        )
        self.core = WorkerCore(
            worker=self.worker,
            engine=self.engine,
            block_size=BLOCK,
            limits=WorkerLimits(max_model_len=MAX_MODEL_LEN, vocab_size=VOCABULARY, offer_patience_s=2.0),
            make_reservation=lambda: ReservationId(random.randbytes(16)),
        )
        self.seals: list[SealBlocks] = []
        self.pulls: list[tuple[PullBlocks, dict[int, int]]] = []
        self.grants: dict[bytes, dict[int, int]] = {}
        self.inbox: deque[Dispatch | Cancel] = deque()
        self.cancelled: dict[SequenceKey, int] = {}


@dataclass(slots=True)
class Link:
    """A control connection. Once `broken`, what is under way may still arrive; then each side notices the loss."""

    channels: dict[WorkerId, deque[bytes]] = field(default_factory=dict)
    joined: set[WorkerId] = field(default_factory=set)
    broken: bool = False


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

    @property
    def over(self) -> bool:
        return self.ending is not None and len(self.tokens()) == len(self.expected)


@dataclass(slots=True)
class Request:
    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParameters
    choices: dict[int, Choice]
    attempt: int = 1
    workers: set[WorkerId] = field(default_factory=set)
    cancelled: bool = False
    placed: bool = True

    @property
    def over(self) -> bool:
        return self.cancelled or all(choice.over for choice in self.choices.values())


class HandoffWorld:
    """`counts` says what happened, so that a test can assert that it tests what it should."""

    def __init__(
        self, random: Random, *, workers: int, weather: Weather = CALM, pool: tuple[int, int] = (6, 16), mixed: bool = False
    ) -> None:
        self.random = random
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
        request_id = f"r{len(self.requests)}"
        expected = [reference(prompt, sampling, choice, MAX_MODEL_LEN) for choice in range(choices)]
        request = Request(
            request_id=request_id,
            prompt=prompt,
            sampling=sampling,
            choices={n: Choice(expected=tokens, expected_ending=ending) for n, (tokens, ending) in enumerate(expected)},
        )
        self.requests[request_id] = request
        self.dispatch(request, WorkerId(worker), None if decode is None else WorkerId(decode))
        return request

    def add_random_request(self) -> None:
        random = self.random
        old = random.choice([(), *(request.prompt for request in self.requests.values())])
        cut = random.choice([0, len(old), random.randint(0, len(old))])
        prompt = (*old[:cut], *random.choices(range(3), k=random.randint(cut == 0, random.choice([2, 16]))))[:22]
        sampling = SamplingParameters(
            max_tokens=random.choice([1, 2, 3, 6, 12]), seed=random.randint(0, 3), ignore_eos=random.random() < 0.7, logprobs=0
        )
        worker, decode = self.random_placement()
        self.add_request(prompt, sampling, choices=random.choice([1, 1, 2, 3]), worker=worker, decode=decode)

    def random_placement(self) -> tuple[WorkerId, WorkerId | None]:
        names = sorted(self.nodes, reverse=True)  # p first
        worker = self.random.choice(names) if self.mixed else names[0]
        others = [name for name in names if name != worker]
        return worker, self.random.choice([*others, *others, *others, None])

    def dispatch(self, request: Request, worker: WorkerId, decode: WorkerId | None) -> None:
        request.workers = {worker} | ({decode} if decode is not None else set())
        request.placed = True
        self.nodes[worker].inbox.append(
            Dispatch(
                request_id=request.request_id,
                attempt=request.attempt,
                gateway="g",
                incarnation="i",
                model=ModelKey("m", "1"),
                prompt=pack_ids(request.prompt),
                choices=[ChoiceState(choice=n, tokens=list(c.given)) for n, c in request.choices.items() if not c.over],
                sampling=request.sampling,
                decode_worker=decode,
            )
        )

    def raise_attempt(self, request: Request) -> None:
        """Place it again, from a prefix of what has arrived (the rest is still under way, and dropped)."""
        self.counts["raise"] += 1
        for worker in request.workers:
            self.nodes[worker].inbox.append(Cancel(request_id=request.request_id, attempt=request.attempt))
        request.attempt += 1
        for choice in request.choices.values():
            if choice.over:
                continue
            tokens = choice.tokens()
            choice.given = tokens[
                : self.random.randint(len(choice.given), max(len(choice.given), min(len(tokens), len(choice.expected) - 1)))
            ]
            choice.fresh, choice.emitters, choice.ending = {}, [], None
        self.dispatch(request, *self.random_placement())

    def cancel(self, request: Request) -> None:
        self.counts["cancel"] += 1
        request.cancelled = True
        for worker in request.workers:
            self.nodes[worker].inbox.append(Cancel(request_id=request.request_id, attempt=request.attempt))

    def take_frame(self, node: Node, entry: FrameEntry) -> None:
        key = SequenceKey(RequestId(entry.request_id), entry.choice)
        assert entry.attempt > node.cancelled.get(key, 0), "tokens after the cancel was handled"
        request = self.requests[entry.request_id]
        if entry.attempt != request.attempt or request.cancelled:
            return
        choice, new = request.choices[entry.choice], entry.new
        for index, token in enumerate(new.tokens, new.first):
            assert index not in choice.fresh, "one index was emitted twice"
            assert index >= len(choice.given), "what was given was emitted again"
            assert token == choice.expected[index], "another token than alone"
            choice.fresh[index] = token
        assert len(new.logprobs) == len(new.tokens)
        if not choice.emitters or choice.emitters[-1] != node.worker:
            assert node.worker not in choice.emitters, "the right to emit came back"
            choice.emitters.append(node.worker)
            assert new.first == len(choice.given) + len(choice.fresh) - len(new.tokens), "a gap where the emitter changed"
            self.counts["emitted_by_two"] += len(choice.emitters) == 2
        if new.ending is not None:
            assert choice.ending is None, "ended twice"
            assert new.ending == choice.expected_ending
            assert max(choice.fresh, default=-1) + 1 in (0, len(choice.expected))
            choice.ending = new.ending

    # ------------------------------------------------------------------ events

    def do_something(self) -> None:
        weather, random = self.weather, self.random
        chance = random.random()
        for share, act in (
            (weather.cancels, self.maybe_cancel),
            (weather.raises, self.maybe_raise),
            (weather.losses, self.maybe_lose),
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

    def enabled(self) -> list[Callable[[], None]]:
        events: list[Callable[[], None]] = []
        for node in self.nodes.values():
            if node.inbox:
                events.append(partial(self.deliver_inbox, node))
            if node.seals:
                events.append(partial(self.seal, node))
            if node.pulls:
                events.append(partial(self.pull, node))
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

    def run_step(self, node: Node) -> None:
        if node.step.busy:
            node.core.on_step(node.step.perform(), self.now)
        else:
            plan = node.core.plan()
            if plan is not None:
                self.counts["steps"] += 1
                node.step.submit(plan)
        self.perform(node)

    def seal(self, node: Node) -> None:
        seal = node.seals.pop(self.random.randrange(len(node.seals)))
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
        for node in self.nodes.values():
            node.core.on_tick(self.now)
            self.perform(node)

    def perform(self, node: Node) -> None:
        """Take the core's effects; check the laws that hold after every event."""
        for effect in node.core.take_effects():
            match effect:
                case SendTokens(entries=entries):
                    for entry in entries:
                        self.take_frame(node, entry)
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
        node.core.check_invariants()

    # ------------------------------------------------------------------ the end

    def settle(self, most: int = 400) -> None:
        """Let everything happen that is due, until nothing is left."""
        for _ in range(most):
            for _ in range(30):
                self.random.choice(self.enabled())()
            self.tick(0.5)
            if self.quiet():
                return
        raise AssertionError(f"not quiet: {[(n.worker, n.engine.load(), n.core.idle) for n in self.nodes.values()]}")

    def quiet(self) -> bool:
        busy = any(n.inbox or n.seals or n.pulls or n.step.busy or not n.core.idle for n in self.nodes.values())
        return not busy and all(link.joined and not link.broken for link in self.links.values())

    def finish(self) -> None:
        """Every request ends; what the cores lost with a connection, the gateway's probe finds and places again."""
        self.weather = Weather(bad_blocks=self.weather.bad_blocks)
        for _ in range(40):
            self.settle()
            stuck = [request for request in self.requests.values() if not request.over]
            if not stuck:
                break
            for request in stuck:
                self.check_lost(request)
                self.raise_attempt(request)
        assert all(request.over for request in self.requests.values()), "a request never ends"
        for request in self.requests.values():
            for choice in request.choices.values():
                assert request.cancelled or choice.tokens() == choice.expected
        for node in self.nodes.values():
            assert node.core.idle
            assert node.pool.held == 0
            assert node.core.desk.offers_queued == 0
            assert not node.grants, "a grant outlives its hand-off"

    def check_lost(self, request: Request) -> None:
        """A choice without an end and without a worker: a probe along `moved` finds nobody who has it; and that happens only
        where a dispatch was turned away, or a connection was lost."""
        if not request.placed:
            return
        assert self.counts["lose"], "a request was lost in calm weather"
        for number, choice in request.choices.items():
            if not choice.over:
                self.counts["lost"] += 1
                states = {worker: self.probe(worker, request, number) for worker in self.nodes}
                assert set(states.values()) <= {"moved", "unknown"}, states

    def probe(self, worker: WorkerId, request: Request, choice: int) -> SequenceState:
        item = ReplayItem(request_id=request.request_id, choice=choice, attempt=request.attempt, next_index=0)
        (entry,) = self.nodes[worker].core.on_replay([item])
        return entry.state
