"""A gateway of the simulated mesh: the real core in a process that can freeze, die and start again, with its clients.

It does what the gateway's shell does: writes the attempt into the record before a dispatch, asks with time-outs, pings the
broker where a probe was not answered, ticks while requests run.
"""

from functools import partial

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
from common.protocol.messages import Dispatch, DispatchReply, FrameEntry, ReplayEntry, Snapshot, TokenFrame, decode_inbox, encode
from common.simulation.simulated_broker import SimulatedBroker
from common.simulation.simulated_client import SimulatedClient
from common.simulation.simulated_process import SimulatedProcess
from common.simulation.simulated_store import SimulatedStore
from common.simulation.simulated_worker import SimulatedWorker
from common.simulation.stray_work import StrayWork
from common.simulation.surroundings import Surroundings
from common.simulation.worker_shape import MODEL
from common.values.errors import BrokerUnavailable, InvariantBroken, StoreUnavailable, Unavailable
from common.values.ids import GatewayId, Incarnation, RequestId, WorkerId

PING_TIMEOUT_S = 1.0
RENEWAL_S = 1.0
MOST_DISPATCHES_AT_ONCE = 8


class SimulatedGateway:
    """`clients` are those of all lives; those of an earlier life are `cut`."""

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
        self.clients: dict[RequestId, SimulatedClient] = {}
        self._around = around
        self._broker = broker
        self._store = store
        self._workers = workers
        self._begin()

    # ------------------------------------------------------------------ lives

    def _begin(self) -> None:
        self.core = GatewayCore(gateway=self.gateway, incarnation=self.incarnation)
        self._ticking = False
        self._dispatched_now: dict[RequestId, tuple[float, int]] = {}
        self._asked: set[tuple[str, int, int]] = set()
        self._strays = StrayWork()
        self.process.after(RENEWAL_S, "renewal", self._renew)

    @property
    def incarnation(self) -> Incarnation:
        return Incarnation(str(self.process.life))

    def die(self) -> None:
        for client in self.clients.values():
            client.cut = client.cut or not client.ends
        self.process.die()
        self._broker.forget(self.process)

    def start_again(self) -> None:
        self.process.start_again()
        self._begin()

    # ------------------------------------------------------------------ clients

    def start(self, client: SimulatedClient, choices: int) -> None:
        """Where the request is turned away at once, there is no client."""
        if not self._broker.connected(self.process):
            self._around.counts["start_unavailable"] += 1
            return
        try:
            self.core.start(
                request_id=client.request_id,
                model=MODEL,
                prompt=client.prompt,
                sampling=client.sampling,
                choices=choices,
                salt=b"",
                deadline=client.deadline,
                now=self._around.now,
            )
        except Unavailable:
            self._around.counts["start_unavailable"] += 1
            return
        self._around.note(self.gateway, f"starts {client.request_id}: {len(client.prompt)} tokens, {choices} choices")
        self.clients[client.request_id] = client
        self._after_event()

    def cancel(self, request_id: RequestId, choice: int | None) -> None:
        client = self.clients[request_id]
        if client.over:
            return
        self._around.note(self.gateway, f"client cancels {request_id} choice {choice}")
        if choice is None:
            client.cancelled = True
        else:
            client.cancelled_choices.add(choice)
        self.core.cancel(request_id, choice, self._around.now)
        self._after_event()

    # ------------------------------------------------------------------ what arrives

    def on_frame(self, frame: TokenFrame) -> None:
        """Whatever carries a lower attempt than the request's present one must change nothing for the client."""
        now = self._around.now
        before = {}
        for entry in frame.entries:
            client = self.clients.get(RequestId(entry.request_id))
            if client is not None and (client.over or entry.attempt < client.attempt):
                before[client.request_id, entry.choice] = len(client.tokens.get(entry.choice, ()))
                self._strays.heard(frame.worker, frame.incarnation, entry, now)
        self.core.on_frame(frame, now)
        self._after_event()
        fresh = {(RequestId(entry.request_id), entry.choice) for entry in frame.entries if entry.attempt == self._attempt(entry)}
        for (request_id, choice), tokens in before.items():
            if (request_id, choice) not in fresh and len(self.clients[request_id].tokens.get(choice, ())) != tokens:
                raise InvariantBroken("tokens of a dead attempt were delivered")

    def _attempt(self, entry: FrameEntry) -> int:
        client = self.clients.get(RequestId(entry.request_id))
        return 0 if client is None else client.attempt

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
            case SendDispatch(dispatch=dispatch):
                self._check_no_loop(RequestId(dispatch.request_id))
                self.clients[RequestId(dispatch.request_id)].attempt = dispatch.attempt
                recorded = partial(self._recorded, effect)
                self._store.record(self.process, dispatch.request_id, dispatch.attempt, recorded)
            case SendReplay():
                self._ask_replay(effect)
            case SendCancel(worker=worker, cancel=cancel):
                receiver = self._workers[worker]
                self._broker.publish(self.process, receiver.process, partial(receiver.on_cancel, cancel), f"{cancel!r}")
            case AskCache(worker=worker):
                receiver = self._workers[worker]
                self._broker.publish(self.process, receiver.process, receiver.on_tell_cache, "tell cache")
            case Accepted(request_id=request_id):
                self.clients[request_id].on_accepted()
            case Deliver():
                self._around.note(self.gateway, f"delivers {effect.request_id}.{effect.choice} from {effect.new.first}")
                self.clients[effect.request_id].on_tokens(effect, self._around.now)
            case Dropped():
                raise InvariantBroken("a request was given up to another gateway, which nobody asked for")
            case Ended():
                self._end(effect)

    def _check_no_loop(self, request_id: RequestId) -> None:
        """However many workers refuse, no request is dispatched over and over at one moment."""
        at, count = self._dispatched_now.get(request_id, (self._around.now, 0))
        count = count + 1 if at == self._around.now else 1
        self._dispatched_now[request_id] = (self._around.now, count)
        if count > MOST_DISPATCHES_AT_ONCE:
            raise InvariantBroken("a loop of dispatches at one moment")

    def _recorded(self, effect: SendDispatch, written: bool) -> None:
        """Without the store nothing new is admitted; what runs may be placed again."""
        dispatch = effect.dispatch
        request_id = RequestId(dispatch.request_id)
        if self.clients[request_id].over:
            return
        if not written and dispatch.attempt == 1:
            self.core.abort(request_id, dispatch.attempt, StoreUnavailable("the store is away"), self._around.now)
            self._after_event()
            return
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
            failed=partial(self._dispatch_failed, effect),
            what=f"dispatch {request_id} attempt {dispatch.attempt} decode {dispatch.decode_worker}",
        )

    def _dispatch_answered(self, effect: SendDispatch, reply: DispatchReply | None) -> None:
        dispatch = effect.dispatch
        verdict = None if reply is None else reply.verdict
        self._around.note(self.gateway, f"dispatch of {dispatch.request_id} to {effect.worker}: {verdict}")
        self.core.on_dispatch_answer(RequestId(dispatch.request_id), dispatch.attempt, effect.worker, reply, self._around.now)
        self._after_event()

    def _dispatch_failed(self, effect: SendDispatch) -> None:
        error = BrokerUnavailable("the connection was lost")
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
        client = self.clients[effect.request_id]
        self._around.note(self.gateway, f"ends {effect.request_id}: {effect.error!r}")
        client.on_end(effect.error)
        if effect.error is not None:
            self._around.counts[f"failed_{getattr(effect.error, 'code', '?')}"] += 1
