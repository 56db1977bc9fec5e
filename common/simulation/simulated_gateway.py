"""A gateway of the simulated mesh: the real core, record keeping and adoption in a process that can freeze, die and start
again, with its clients.

It does what the gateway's shell does: writes the attempt into the record before a dispatch, asks with time-outs, pings the
broker where a probe was not answered, keeps its records, ticks while requests run.
"""

from collections.abc import Callable
from functools import partial

from common.mesh.adoption import adopted_request, logged_tokens
from common.mesh.attachment import Attachable, EndedElsewhere, Ours, TakenOver
from common.mesh.gateway import GatewayCore
from common.mesh.gateway_effects import (
    Accepted,
    AskCache,
    Deliver,
    Dropped,
    Ended,
    GatewayEffect,
    SendCancel,
    SendDispatch,
    SendReplay,
)
from common.mesh.owner_watch import SILENT_FOR_S
from common.mesh.request_keeper import RequestKeeper
from common.mesh.request_progress import recorded_generation
from common.mesh.request_store import RequestStore
from common.policy.routing import PlacementRules
from common.ports.generation import GenerationRequest
from common.protocol.messages import Dispatch, DispatchReply, FrameEntry, ReplayEntry, Snapshot, TokenFrame, decode_inbox, encode
from common.simulation.one_at_a_time import OneAtATime
from common.simulation.simulated_broker import SimulatedBroker
from common.simulation.simulated_client import SimulatedClient
from common.simulation.simulated_process import SimulatedProcess
from common.simulation.simulated_store import SimulatedStore
from common.simulation.simulated_worker import SimulatedWorker
from common.simulation.stray_work import StrayWork
from common.simulation.streamed_request import StreamedRequest
from common.simulation.surroundings import Surroundings
from common.simulation.virtual_coroutine import drive
from common.simulation.worker_shape import MODEL, NAMES
from common.values.errors import BrokerUnavailable, InvariantBroken, Moved, RequestFailed, SegueError, Unavailable
from common.values.ids import GatewayId, Incarnation, RequestId, WorkerId

DISPATCH_TIMEOUT_S = 2.0
REPLAY_TIMEOUT_S = 1.0
PING_TIMEOUT_S = 1.0
RENEWAL_S = 1.0
KEEPING_S = 1.0
MOST_DISPATCHES_AT_ONCE = 8
TENANT = ""
FREE = 0.5
"""Of the gateways' lives place freely; the others keep the roles strictly."""


class SimulatedGateway:
    """`clients` are all that are connected here."""

    def __init__(
        self,
        name: str,
        around: Surroundings,
        broker: SimulatedBroker,
        store: SimulatedStore,
        workers: dict[WorkerId, SimulatedWorker],
    ) -> None:
        self.gateway = GatewayId(name)
        self.process = SimulatedProcess(name, around)
        self.clients: list[SimulatedClient] = []
        self._around = around
        self._broker = broker
        self._store = store
        self._workers = workers
        self._begin()

    # ------------------------------------------------------------------ lives

    def _begin(self) -> None:
        strays_from = self._around.now + SILENT_FOR_S
        rules = PlacementRules(free=self._around.random.random() < FREE)
        self.core = GatewayCore(gateway=self.gateway, incarnation=self.incarnation, strays_from=strays_from, rules=rules)
        records = RequestStore(
            self._store.client(self.process),
            NAMES,
            gateway=self.gateway,
            incarnation=self.incarnation,
            wall_clock=lambda: self._around.now,
        )
        self.kept: RequestKeeper[StreamedRequest] = RequestKeeper(records, clock=lambda: self._around.now, on_lost=self._lose)
        self._known: dict[RequestId, StreamedRequest] = {}
        self._ticking = False
        self._dispatched_now: dict[RequestId, tuple[float, int]] = {}
        self._asked: set[tuple[str, int, int]] = set()
        self._strays = StrayWork()
        self._attaches = OneAtATime()
        self.process.after(RENEWAL_S, "renewal", self._renew)
        self.process.after(KEEPING_S, "keeping", self._keep)

    @property
    def incarnation(self) -> Incarnation:
        return Incarnation(f"{self.gateway}.{self.process.life}")

    def die(self) -> None:
        self.process.die()
        self._broker.forget(self.process)
        clients, self.clients = self.clients, []
        for client in clients:
            if client.at is self.process:
                client.disconnected()

    def start_again(self) -> None:
        self.process.start_again()
        self._begin()

    # ------------------------------------------------------------------ clients

    def start(self, client: SimulatedClient) -> None:
        """Where the request is turned away at once, the client is `cut`."""
        request = GenerationRequest(
            request_id=client.request_id,
            model=MODEL.name,
            prompt=client.prompt,
            sampling=client.sampling,
            choices=len(client.expected),
            deadline_s=client.deadline_s,
            lingers=client.lingers,
        )
        now = self._around.now
        try:
            if not self._broker.connected(self.process):
                raise BrokerUnavailable("the message broker is not connected")
            self.core.start(
                request_id=client.request_id,
                model=MODEL,
                prompt=client.prompt,
                sampling=client.sampling,
                choices=len(client.expected),
                salt=b"",
                deadline=None if client.deadline_s is None else now + client.deadline_s,
                now=now,
            )
        except Unavailable:
            self._around.counts["start_unavailable"] += 1
            client.cut = True
            return
        self._around.note(self.gateway, f"starts {client.request_id}: {len(client.prompt)} tokens, {len(client.expected)} choices")
        owned = self._streamed(request)
        self._connect(client)
        self._own(owned)
        owned.join(client)
        self._after_event()

    def attach(self, client: SimulatedClient, failed: Callable[[SegueError], None]) -> None:
        """A client comes back. `failed` is told why it cannot be served."""
        self._around.note(self.gateway, f"{client.request_id} comes back with { ({c: len(t) for c, t in client.tokens.items()}) }")
        self._connect(client)
        self._attaches.ask(client.request_id, partial(self._attach, client, client.connections, failed))

    def _attach(self, client: SimulatedClient, connection: int, failed: Callable[[SegueError], None]) -> None:
        def refused(error: SegueError) -> None:
            if client.connections == connection:
                failed(error)
            self._attaches.answered(client.request_id)

        def found(attachable: Attachable[StreamedRequest]) -> None:
            self._attached(client, connection, attachable)
            self._attaches.answered(client.request_id)

        drive(self.kept.attach(client.request_id, TENANT, may_take=lambda: self._broker.connected(self.process)), found, refused)

    def cancel(self, client: SimulatedClient, choice: int | None) -> None:
        """The client ends a choice, or all."""
        if client.over or client.at is not self.process or client.reads is None:
            return
        self._around.note(self.gateway, f"client cancels {client.request_id} choice {choice}")
        if choice is None:
            client.cancelled = True
        else:
            client.cancelled_choices.add(choice)
        client.reads.cancel(choice)

    def left(self, client: SimulatedClient, streamed: StreamedRequest) -> None:
        """The connection of a client that is elsewhere by now."""
        self._around.note(self.gateway, f"{client.request_id} has left")
        streamed.leave(client)

    def _connect(self, client: SimulatedClient) -> None:
        client.at = self.process
        client.connections += 1
        self.clients.append(client)

    def _streamed(self, request: GenerationRequest) -> StreamedRequest:
        return StreamedRequest(request, cancel_in_mesh=self._cancel, clock=lambda: self._around.now)

    def _own(self, owned: StreamedRequest) -> None:
        self.kept.add(owned)
        self._known[owned.request_id] = owned

    def _attached(self, client: SimulatedClient, connection: int, found: Attachable[StreamedRequest]) -> None:
        self._around.note(self.gateway, f"found {client.request_id}: {type(found).__name__}")
        self._around.counts[f"attached_{type(found).__name__}"] += 1
        match found:
            case Ours(owned=owned):
                owned.lingers = True
            case EndedElsewhere():
                owned = self._ended(client.request_id, found)
            case TakenOver():
                owned = self._adopt(client.request_id, found)
        if client.over or client.at is not self.process or client.connections != connection:
            owned.nobody_reads()
            return
        client.resumes += 1
        owned.join(client)
        for choice in sorted(client.cancelled_choices):
            owned.cancel(choice)

    def _ended(self, request_id: RequestId, found: EndedElsewhere) -> StreamedRequest:
        owned = self._streamed(recorded_generation(request_id, found.record))
        owned.accepted = True
        for choice, new in logged_tokens(found.record.facts, found.log).items():
            owned.deliver(choice, new)
        failed = found.record.error
        owned.finish(None if failed is None else RequestFailed(failed.message, code=failed.code, status=failed.status))
        return owned

    def _adopt(self, request_id: RequestId, found: TakenOver) -> StreamedRequest:
        record, now = found.record, self._around.now
        deadline = None if record.facts.deadline_s is None else now + record.facts.deadline_s
        request = adopted_request(request_id, record, found.log, epoch=found.epoch, deadline=deadline)
        owned = self._streamed(recorded_generation(request_id, record))
        owned.taken_over(record, epoch=found.epoch, attempt=request.attempt)
        owned.accepted = True
        self._own(owned)
        self.core.adopt(request, logged_tokens(record.facts, found.log), now)
        self._after_event()
        return owned

    def _cancel(self, request_id: RequestId, choice: int | None) -> None:
        self.core.cancel(request_id, choice, self._around.now)
        self._after_event()
        owned = self.kept.get(request_id)
        if choice is not None and owned is not None and owned.is_recorded:
            drive(self.kept.record_choice(owned, choice), _nothing)

    # ------------------------------------------------------------------ what arrives

    def on_frame(self, frame: TokenFrame) -> None:
        """Whatever carries a lower attempt than the request's present one must change nothing for the client."""
        now = self._around.now
        before = {}
        for entry in frame.entries:
            owned = self._known.get(RequestId(entry.request_id))
            if owned is not None and (owned.is_over or entry.attempt < owned.attempt):
                before[owned.request_id, entry.choice] = len(owned.choices[entry.choice].tokens)
                self._strays.heard(frame.worker, frame.incarnation, entry, now)
        self.core.on_frame(frame, now)
        self._after_event()
        fresh = {(RequestId(entry.request_id), entry.choice) for entry in frame.entries if entry.attempt == self._attempt(entry)}
        for (request_id, choice), tokens in before.items():
            if (request_id, choice) not in fresh and len(self._known[request_id].choices[choice].tokens) != tokens:
                raise InvariantBroken("tokens of a dead attempt were delivered")

    def _attempt(self, entry: FrameEntry) -> int:
        owned = self._known.get(RequestId(entry.request_id))
        return 0 if owned is None else owned.attempt

    def on_snapshot(self, snapshot: Snapshot) -> None:
        self.core.on_snapshot(snapshot, self._around.now)
        self._after_event()

    # ------------------------------------------------------------------ loops

    def _tick(self) -> None:
        self._ticking = False
        if not self._broker.connected(self.process):
            self.core.registry.refresh(self._around.now)
        self.core.on_tick(self._around.now)
        self._after_event()

    def _renew(self) -> None:
        self.process.after(RENEWAL_S, "renewal", self._renew)
        for worker in self._workers.values():
            beat = partial(worker.on_gateway_beat, self.gateway, self.incarnation)
            self._broker.publish(self.process, worker.process, beat, "beat")
        if self._broker.connected(self.process):
            self.core.registry.expire(self._around.now)
        else:
            self.core.registry.refresh(self._around.now)
        self._around.counts["left_unread"] += self.kept.end_unread()

    def _keep(self) -> None:
        drive(self.kept.keep(), lambda _: self.process.after(KEEPING_S, "keeping", self._keep))

    def _lose(self, request_id: RequestId) -> None:
        """Where we take it back before our last probe of it was answered, the new owner that we are asks again."""
        self._asked = {asked for asked in self._asked if asked[0] != request_id}
        self.core.drop(request_id, self._around.now)
        self._after_event()

    def _after_event(self) -> None:
        for effect in self.core.take_effects():
            self._perform(effect)
        due = self.core.get_timer(self._around.now)
        if due is not None and not self._ticking:
            self._ticking = True
            self.process.after(due - self._around.now, "tick", self._tick)

    # ------------------------------------------------------------------ effects

    def _perform(self, effect: GatewayEffect) -> None:
        match effect:
            case SendDispatch():
                self._record(effect)
            case SendReplay():
                self._ask_replay(effect)
            case SendCancel(worker=worker, cancel=cancel):
                receiver = self._workers[worker]
                self._broker.publish(self.process, receiver.process, partial(receiver.on_cancel, cancel), f"{cancel!r}")
            case AskCache(worker=worker):
                receiver = self._workers[worker]
                self._broker.publish(self.process, receiver.process, receiver.on_tell_cache, "tell cache")
            case Accepted(request_id=request_id):
                self._of(request_id).was_accepted()
            case Deliver():
                self._around.note(self.gateway, f"delivers {effect.request_id}.{effect.choice} from {effect.new.first}")
                self._of(effect.request_id).deliver(effect.choice, effect.new)
            case Dropped(request_id=request_id):
                self._around.counts["dropped"] += 1
                self._around.note(self.gateway, f"drops {request_id}")
                self.kept.remove(request_id).finish(Moved("another gateway goes on with this request"))
            case Ended():
                self._end(effect)

    def _of(self, request_id: RequestId) -> StreamedRequest:
        owned = self.kept.get(request_id)
        if owned is None:
            raise InvariantBroken(f"the core runs {request_id}, which nobody owns")
        return owned

    def _check_no_loop(self, request_id: RequestId) -> None:
        """However many workers refuse, no request is dispatched over and over at one moment."""
        at, count = self._dispatched_now.get(request_id, (self._around.now, 0))
        count = count + 1 if at == self._around.now else 1
        self._dispatched_now[request_id] = (self._around.now, count)
        if count > MOST_DISPATCHES_AT_ONCE:
            raise InvariantBroken("a loop of dispatches at one moment")

    def _record(self, effect: SendDispatch) -> None:
        """The record shows the attempt before its worker is told."""
        dispatch = effect.dispatch
        request_id = RequestId(dispatch.request_id)
        self._check_no_loop(request_id)
        owned = self._of(request_id)
        owned.placed(dispatch.attempt, effect.worker, dispatch.decode_worker)
        drive(self.kept.record_placement(owned), partial(self._recorded, effect), partial(self._dispatch_failed, effect))

    def _recorded(self, effect: SendDispatch, wanted: bool) -> None:
        if not wanted:
            return
        dispatch = effect.dispatch
        worker = self._workers[effect.worker]
        decoded = decode_inbox(encode(dispatch))
        if not isinstance(decoded, Dispatch):
            raise InvariantBroken("a dispatch that is none once it was sent")
        self._broker.ask(
            self.process,
            worker.process,
            timeout_s=effect.within_s,
            handle=partial(worker.on_dispatch, decoded),
            answered=partial(self._dispatch_answered, effect),
            failed=partial(self._dispatch_failed, effect, BrokerUnavailable("the connection was lost")),
            what=f"dispatch {dispatch.request_id} attempt {dispatch.attempt} decode {dispatch.decode_worker}",
        )

    def _dispatch_answered(self, effect: SendDispatch, reply: DispatchReply | None) -> None:
        dispatch = effect.dispatch
        verdict = None if reply is None else reply.verdict
        self._around.note(self.gateway, f"dispatch of {dispatch.request_id} to {effect.worker}: {verdict}")
        self.core.on_dispatch_answer(RequestId(dispatch.request_id), dispatch.attempt, effect.worker, reply, self._around.now)
        self._after_event()

    def _dispatch_failed(self, effect: SendDispatch, error: SegueError) -> None:
        self.core.abort(RequestId(effect.dispatch.request_id), effect.dispatch.attempt, error, self._around.now)
        self._after_event()

    def _ask_replay(self, effect: SendReplay) -> None:
        worker = self._workers[effect.worker]
        asked = {(item.request_id, item.attempt, item.choice) for item in effect.items}
        if asked & self._asked:
            raise InvariantBroken("a second probe of a choice while one is under way")
        self._asked |= asked
        self._broker.ask(
            self.process,
            worker.process,
            timeout_s=effect.within_s,
            handle=partial(worker.on_replay, effect.items, self.gateway, self.incarnation),
            answered=partial(self._replay_answered, effect),
            failed=partial(self._replay_over, effect, None, broker_alive=False),
            what=f"replay {sorted(asked)}",
        )

    def _replay_answered(self, effect: SendReplay, answer: tuple[Incarnation, list[ReplayEntry]] | None) -> None:
        if answer is not None:
            incarnation, entries = answer
            states = [(entry.request_id, entry.choice, entry.attempt, entry.state) for entry in entries]
            self._around.note(self.gateway, f"replay from {effect.worker}: {states}")
            self._replay_over(effect, entries, broker_alive=True, incarnation=incarnation)
            return
        alive = self._broker.answers_pings(self.process)
        takes = self._around.takes(self._around.strength.message_delay_s) if alive else PING_TIMEOUT_S
        self.process.after(takes, "ping", partial(self._replay_over, effect, None, broker_alive=alive))

    def _replay_over(
        self, effect: SendReplay, entries: list[ReplayEntry] | None, *, broker_alive: bool, incarnation: Incarnation | None = None
    ) -> None:
        self._asked -= {(item.request_id, item.attempt, item.choice) for item in effect.items}
        now = self._around.now
        self.core.on_replay_answer(effect.worker, effect.items, entries, now, broker_alive=broker_alive, incarnation=incarnation)
        self._after_event()

    def _end(self, effect: Ended) -> None:
        owned = self.kept.remove(effect.request_id)
        self._around.note(self.gateway, f"ends {effect.request_id}: {effect.error!r}")
        owned.finish(effect.error)
        if effect.error is not None:
            self._around.counts[f"failed_{getattr(effect.error, 'code', '?')}"] += 1
        drive(self.kept.record_end(owned, effect.error), _nothing)


def _nothing(_: object) -> None:
    return None
