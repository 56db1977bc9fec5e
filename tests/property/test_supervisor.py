"""The supervisor machine against children that behave in any way: they die, hang, refuse, come back, or ignore SIGTERM."""

from hypothesis import given, settings
from hypothesis import strategies as st

from common.policy.watchdog import process_frozen_after_s
from common.runtime.supervisor import LONGEST_PAUSE_S, TICK_S, Supervisor
from common.runtime.supervisor_states import (
    RUNNING,
    TRANSITIONS,
    AllReady,
    Begin,
    ChildSpec,
    Exited,
    Finished,
    Notified,
    Report,
    Signal,
    Spawn,
    StopAsked,
    Stopping,
    SupervisorEffect,
    SupervisorEvent,
    TimerFired,
)

SPECS = (
    ChildSpec(name="nats", start_stage=0, stop_stage=0, drain_s=2.0),
    ChildSpec(name="prefill-0", start_stage=1, stop_stage=1, drain_s=5.0),
    ChildSpec(name="decode-0", start_stage=1, stop_stage=1, drain_s=5.0),
    ChildSpec(name="gateway", start_stage=1, stop_stage=2, drain_s=5.0),
)
STAGE = {spec.name: spec.stop_stage for spec in SPECS}
NAMES = [spec.name for spec in SPECS]


class World:
    """Runs the machine and keeps what really is: which processes exist, and what was done to them."""

    def __init__(self) -> None:
        self.machine = Supervisor(SPECS)
        self.now = 100.0
        self.alive: dict[str, int] = {}
        self.starts: dict[str, int] = {}
        self.killed: set[str] = set()
        self.stop_count = 0
        self.stopping = False
        self.finished: list[int] = []
        self.ready_count = 0
        self.log: list[SupervisorEffect] = []

    def send(self, event: SupervisorEvent) -> list[SupervisorEffect]:
        effects = self.machine.handle(event, self.now)
        self.machine.check_invariants()
        for effect in effects:
            self._see(effect)
        self.log += effects
        timer = self.machine.get_timer()
        assert (timer is None) == bool(self.finished) or not self.starts
        assert timer is None or self.now <= timer <= self.now + TICK_S
        return effects

    def _see(self, effect: SupervisorEffect) -> None:
        assert not self.finished, "nothing follows the end"
        match effect:
            case Spawn(name=name, start=start):
                assert not self.stopping, "nothing is started while all stops"
                assert name not in self.alive, "one process a child"
                assert start == self.starts.get(name, 0) + 1
                self.alive[name] = self.starts[name] = start
                self.killed.discard(name)
            case Signal(name=name, force=True):
                assert name in self.alive
                self.killed.add(name)
            case Signal(name=name, force=False):
                assert self.stopping
                above = [other for other in self.alive if STAGE[other] > STAGE[name]]
                assert self.stop_count >= 2 or not above, "the gateway first, the brokers last"
            case Stopping():
                assert not self.stopping
                self.stopping = True
            case AllReady():
                self.ready_count += 1
                assert set(self.machine.states.values()) == {"ready"}
            case Finished(code=code):
                assert not self.alive
                self.finished.append(code)
            case Report():
                pass

    def exit(self, name: str, code: int) -> None:
        start = self.alive.pop(name, None)
        if start is not None:
            self.send(Exited(name=name, start=start, code=code))

    def notify(self, name: str, state: str | None) -> None:
        if name in self.alive:
            self.send(Notified(name=name, start=self.alive[name], state=state))  # type: ignore[arg-type]

    def tick(self, seconds: float = TICK_S) -> None:
        self.now += seconds
        self.send(TimerFired())


ACTIONS = st.one_of(
    st.tuples(st.just("notify"), st.sampled_from(NAMES), st.sampled_from(["loading", "ready", "draining", None])),
    st.tuples(st.just("exit"), st.sampled_from(NAMES), st.sampled_from([0, 1, 2, -9, -11])),
    st.tuples(st.just("tick"), st.floats(0.0, 30.0), st.none()),
    st.tuples(st.just("stale"), st.sampled_from(NAMES), st.none()),
    st.tuples(st.just("stop"), st.none(), st.none()),
)


def _act(world: World, action: tuple[str, object, object]) -> None:
    kind, first, second = action
    match kind:
        case "notify":
            world.notify(str(first), None if second is None else str(second))
        case "exit":
            assert isinstance(second, int)
            world.exit(str(first), second)
        case "tick":
            assert isinstance(first, float)
            world.tick(first)
        case "stale":
            world.send(Exited(name=str(first), start=0, code=0))
            world.send(Notified(name=str(first), start=999, state="ready"))
        case "stop":
            world.stop_count += 1
            world.send(StopAsked())


@settings(max_examples=300, deadline=None)
@given(st.lists(ACTIONS, max_size=60))
def test_whatever_children_do_all_end_once_after_a_stop(actions: list[tuple[str, object, object]]) -> None:
    world = World()
    world.send(Begin())
    for action in actions:
        if not world.finished:
            _act(world, action)
    if not world.finished and not world.stopping:
        world.send(StopAsked())
    for _ in range(40):
        for name in list(world.killed & set(world.alive)):
            world.exit(name, -9)
        if world.finished:
            break
        world.tick()
    assert len(world.finished) == 1, "children that ignore SIGTERM are killed at their deadline"
    assert not world.alive
    assert world.ready_count <= 1


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(NAMES), st.lists(st.floats(0.0, 1.5), min_size=15, max_size=60))
def test_a_silent_process_is_killed_and_the_others_are_not(silent: str, steps: list[float]) -> None:
    world = _ready()
    silence = 0.0
    for step in steps:
        world.now += step
        silence += step
        for name in NAMES:
            if name != silent:
                world.notify(name, None)
        world.send(TimerFired())
        assert world.killed <= {silent}
        assert (silent in world.killed) == (silence >= process_frozen_after_s())
        if silent in world.killed:
            return


def test_a_pause_of_the_supervisor_itself_is_nobodys_silence() -> None:
    world = _ready()
    world.tick(500.0)
    assert not world.killed
    for _ in range(12):
        world.tick()
    assert world.killed == set(NAMES)


def test_pauses_between_starts_double_and_a_stable_run_forgives() -> None:
    world = _ready()
    pauses = []
    for _ in range(9):
        world.exit("decode-0", 1)
        ended = world.now
        while "decode-0" not in world.alive:
            timer = world.machine.get_timer()
            assert timer is not None
            world.tick(timer - world.now)
            for name in NAMES:
                world.notify(name, None)
        pauses.append(round(world.now - ended, 6))
        world.notify("decode-0", "ready")
    assert pauses == sorted(pauses)
    assert pauses[:4] == [0.25, 0.5, 1.0, 2.0]
    assert pauses[-1] == LONGEST_PAUSE_S
    for _ in range(40):
        for name in NAMES:
            world.notify(name, None)
        world.tick()
    world.exit("decode-0", 1)
    world.tick(0.25)
    assert "decode-0" in world.alive


def test_stages_start_in_order_and_a_restart_waits_for_nobody() -> None:
    world = World()
    world.send(Begin())
    assert set(world.alive) == {"nats"}
    world.notify("nats", "ready")
    assert set(world.alive) == set(NAMES)
    world.exit("nats", -9)
    world.exit("gateway", 1)
    world.tick(0.3)
    assert set(world.alive) == set(NAMES)


def test_refused_settings_end_the_whole_with_their_status() -> None:
    world = World()
    world.send(Begin())
    world.notify("nats", "ready")
    world.exit("prefill-0", 2)
    assert world.stopping
    _end_all(world)
    assert world.finished == [2]


def test_a_process_that_never_starts_ends_the_whole_until_it_was_ready_once() -> None:
    world = World()
    world.send(Begin())
    world.notify("nats", "ready")
    for _ in range(4):
        world.exit("prefill-0", 1)
        world.tick(2.0)
    _end_all(world)
    assert world.finished == [1]
    ready = _ready()
    for _ in range(20):
        ready.exit("prefill-0", 2)
        for _ in range(11):
            ready.tick()
            for name in NAMES:
                ready.notify(name, None)
    assert not ready.stopping


def test_a_second_stop_kills_everything_at_once() -> None:
    world = _ready()
    world.stop_count = 1
    world.send(StopAsked())
    assert world.killed == set()
    world.stop_count = 2
    world.send(StopAsked())
    assert world.killed == set(NAMES)


def test_draining_goes_gateway_workers_brokers() -> None:
    world = _ready()
    world.send(StopAsked())
    order = []
    while not world.finished:
        asked = [effect.name for effect in world.log if isinstance(effect, Signal) and not effect.force and effect.name in world.alive]
        assert asked
        order.append(set(asked))
        for name in asked:
            world.exit(name, 0)
    assert order == [{"gateway"}, {"prefill-0", "decode-0"}, {"nats"}]
    assert world.finished == [0]


def test_the_table_leads_from_every_running_state_to_an_end() -> None:
    for state in RUNNING:
        assert TRANSITIONS[(state, "exit")] in ("backoff", "stopped")
        assert (state, "stop") in TRANSITIONS


def _ready() -> World:
    world = World()
    world.send(Begin())
    for name in NAMES:
        world.notify(name, "ready")
    assert world.ready_count == 1
    return world


def _end_all(world: World) -> None:
    for _ in range(4):
        for name in sorted(world.alive, key=lambda name: -STAGE[name]):
            world.exit(name, 0)
