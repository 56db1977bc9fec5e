"""The end of a hand-off world: everything that is still due happens, and nothing is left behind."""

from common.protocol.messages import ReplayItem, SequenceState
from common.values.ids import WorkerId
from tests.handoff_requests import Request
from tests.handoff_world import HandoffWorld, Weather


def settle(world: HandoffWorld, most: int = 400) -> None:
    """Let everything happen that is due, until nothing is left."""
    for _ in range(most):
        for _ in range(30):
            world.random.choice(world.enabled())()
        world.tick(0.5)
        if quiet(world):
            return
    raise AssertionError(f"not quiet: {[(n.worker, n.engine.load(), n.core.idle) for n in world.nodes.values()]}")


def quiet(world: HandoffWorld) -> bool:
    busy = any(n.inbox or n.seals or n.pulls or n.step.busy or not n.core.idle for n in world.nodes.values())
    return not busy and all(link.joined and not link.broken for link in world.links.values())


def finish(world: HandoffWorld) -> None:
    """Every request ends; what the cores lost with a connection, the gateway's probe finds and places again."""
    world.weather = Weather(bad_blocks=world.weather.bad_blocks)
    for _ in range(40):
        settle(world)
        stuck = [request for request in world.requests.values() if not request.over]
        if not stuck:
            break
        for request in stuck:
            check_lost(world, request)
            world.raise_attempt(request)
    assert all(request.over for request in world.requests.values()), "a request never ends"
    for request in world.requests.values():
        for choice in request.choices.values():
            assert request.cancelled or choice.tokens() == choice.expected
    for node in world.nodes.values():
        assert node.core.idle
        assert node.pool.held == 0
        assert node.core.desk.receiving.offers_queued == 0
        assert not node.grants, "a grant outlives its hand-off"


def check_lost(world: HandoffWorld, request: Request) -> None:
    """A choice without an end and without a worker: a probe along `moved` finds nobody who has it; and that happens only
    where a dispatch was turned away, or a connection was lost."""
    if not request.placed:
        return
    assert world.counts["lose"], "a request was lost in calm weather"
    for number, choice in request.choices.items():
        if not choice.over:
            world.counts["lost"] += 1
            states = {worker: probe(world, worker, request, number) for worker in world.nodes}
            assert set(states.values()) <= {"moved", "unknown"}, states


def probe(world: HandoffWorld, worker: WorkerId, request: Request, choice: int) -> SequenceState:
    item = ReplayItem(request_id=request.request_id, choice=choice, attempt=request.attempt, next_index=0)
    (entry,) = world.nodes[worker].core.on_replay([item])
    return entry.state
