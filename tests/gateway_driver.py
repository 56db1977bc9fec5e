"""A gateway core driven by literal events and times: workers are names, and their answers what the test says."""

from dataclasses import dataclass, field

from common.mesh.gateway import GatewayCore
from common.mesh.gateway_effects import Deliver, Ended, GatewayEffect, SendCancel, SendDispatch, SendReplay
from common.protocol.messages import (
    DispatchReply,
    DispatchVerdict,
    FrameEntry,
    NoticeKind,
    ReplayEntry,
    ReplayItem,
    SequenceNotice,
    SequenceState,
    Snapshot,
    TokenFrame,
)
from common.values.errors import SegueError
from common.values.ids import GatewayId, Incarnation, ModelKey, RequestId, WorkerId
from common.values.kv_layout import Fingerprint, KvLayout
from common.values.sampling import SamplingParameters
from common.values.tokens import Ending, NewTokens
from common.values.worker import Role, WorkerSnapshot

R = RequestId("r")
MODEL = ModelKey("m", "1")
END = Ending(reason="length")
FINGERPRINT = Fingerprint(weights="w", dtype="float32", layout=KvLayout(layers=1, kv_heads=1, head_dim=1, block_size=4))


@dataclass(slots=True)
class Driver:
    """`log` holds all effects so far; the methods that ask for effects return those since the last such call."""

    core: GatewayCore = field(default_factory=lambda: GatewayCore(gateway=GatewayId("g"), incarnation=Incarnation("i")))
    log: list[GatewayEffect] = field(default_factory=list)
    numbers: int = 0

    def know(
        self,
        name: str,
        now: float = 0.0,
        *,
        role: Role = "both",
        peers: tuple[str, ...] = (),
        step_s: float = 0.0,
        incarnation: str = "1",
    ) -> None:
        self.numbers += 1
        snapshot = WorkerSnapshot(
            worker=WorkerId(name),
            incarnation=Incarnation(incarnation),
            model=MODEL,
            role=role,
            state="ready",
            sequence_number=self.numbers,
            control_host="",
            control_port=0,
            fingerprint=FINGERPRINT,
            max_model_len=100,
            max_num_seqs=4,
            blocks_total=10,
            blocks_free=10,
            blocks_cached=0,
            seconds_per_step=step_s,
            peers=dict.fromkeys(peers, "memory"),
        )
        self.core.on_snapshot(Snapshot(snapshot=snapshot), now)

    def farewell(self, name: str, now: float) -> None:
        known = self.core.registry.get(WorkerId(name))
        assert known is not None
        self.core.on_snapshot(Snapshot(snapshot=known, gone=True), now)

    def start(self, now: float = 0.0, *, choices: int = 1, max_tokens: int = 8, deadline: float | None = None) -> None:
        self.core.start(
            request_id=R,
            model=MODEL,
            prompt=(1, 2, 3),
            sampling=SamplingParameters(max_tokens=max_tokens, seed=1),
            choices=choices,
            salt=b"",
            deadline=deadline,
            now=now,
        )

    def started(self, *names: str, choices: int = 1, now: float = 0.0) -> None:
        """The request runs at the first of these workers."""
        for name in names:
            self.know(name, now)
        self.start(now, choices=choices)
        self.answer(names[0], "accepted", now=now)
        self.take()

    def answer(self, worker: str, verdict: DispatchVerdict | None, *, attempt: int = 1, code: str = "", now: float = 0.0) -> None:
        reply = None
        if verdict is not None:
            reply = DispatchReply(request_id=R, attempt=attempt, verdict=verdict, code=code, message="why")
        self.core.on_dispatch_answer(R, attempt, WorkerId(worker), reply, now)

    def frame(
        self, worker: str, first: int, *tokens: int, now: float, attempt: int = 1, choice: int = 0, end: bool = False, request: str = R
    ) -> None:
        new = NewTokens(first=first, tokens=tokens, ending=END if end else None)
        entry = FrameEntry(request_id=request, choice=choice, attempt=attempt, new=new)
        self.core.on_frame(TokenFrame(worker=worker, incarnation="1", entries=[entry]), now)

    def notice(
        self, worker: str, kind: NoticeKind, *, now: float, attempt: int = 1, choice: int = 0, moved_to: str | None = None
    ) -> None:
        notice = SequenceNotice(request_id=R, choice=choice, attempt=attempt, kind=kind, moved_to=moved_to)
        self.core.on_frame(TokenFrame(worker=worker, incarnation="1", entries=[], notices=[notice]), now)

    def replay(
        self,
        worker: str,
        state: SequenceState | None,
        *,
        now: float,
        attempt: int = 1,
        choice: int = 0,
        new: NewTokens | None = None,
        moved_to: str | None = None,
        broker_alive: bool = True,
        incarnation: str = "1",
    ) -> None:
        """The answer to a probe of one choice; no answer where `state` is None."""
        item = ReplayItem(request_id=R, choice=choice, attempt=attempt, next_index=0)
        entries = None
        if state is not None:
            entries = [ReplayEntry(request_id=R, choice=choice, attempt=attempt, state=state, new=new, moved_to=moved_to)]
        self.core.on_replay_answer(
            WorkerId(worker), [item], entries, now, broker_alive=broker_alive, incarnation=Incarnation(incarnation)
        )

    def silent_probes(self, worker: str, count: int, *, now: float, attempt: int = 1) -> None:
        for _ in range(count):
            self.replay(worker, None, attempt=attempt, now=now)

    def take(self) -> list[GatewayEffect]:
        effects = self.core.take_effects()
        self.log += effects
        return effects

    def tick(self, now: float) -> list[GatewayEffect]:
        self.core.on_tick(now)
        return self.take()

    def dispatches(self) -> list[tuple[str, int]]:
        """(worker, attempt) of the dispatches since the last question."""
        return [(e.worker, e.dispatch.attempt) for e in self.take() if isinstance(e, SendDispatch)]

    def cancels(self) -> list[tuple[str, int, list[int] | None]]:
        return [(e.worker, e.cancel.attempt, e.cancel.choices) for e in self.take() if isinstance(e, SendCancel)]

    def probes(self, now: float) -> list[tuple[str, list[int]]]:
        """A tick, and whom it probes for which choices."""
        return [(e.worker, [item.choice for item in e.items]) for e in self.tick(now) if isinstance(e, SendReplay)]

    def delivered(self, choice: int = 0) -> list[int]:
        self.take()
        return [token for e in self.log if isinstance(e, Deliver) and e.choice == choice for token in e.new.tokens]

    def ends(self) -> list[SegueError | None]:
        self.take()
        return [e.error for e in self.log if isinstance(e, Ended)]

    def error(self) -> SegueError:
        (error,) = self.ends()
        assert error is not None
        return error
