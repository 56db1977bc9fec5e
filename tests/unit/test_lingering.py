"""What becomes of a request whose readers have left: a plain one ends at once, one that lingers after a while, or for room."""

import pytest

from common.adapters.memory_store import MemoryStore
from common.mesh import request_keeper
from common.mesh.request_keeper import LINGER_S, RequestKeeper
from common.mesh.request_store import RequestStore
from common.ports.generation import GenerationRequest
from common.protocol.subjects import Names
from common.values.errors import RequestFailed
from common.values.ids import GatewayId, Incarnation, ModelKey, RequestId
from common.values.sampling import SamplingParameters
from common.values.tokens import NewTokens
from services.gateway.live_generation import OwnedRequest


class Gateway:
    """A keeper with a clock that the test moves; `cancelled` is what the mesh was told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.cancelled: list[tuple[str, int | None]] = []
        store = RequestStore(
            MemoryStore(self.clock), Names("t"), gateway=GatewayId("g"), incarnation=Incarnation("i"), wall_clock=lambda: 0.0
        )
        self.kept = RequestKeeper(store, clock=self.clock, on_lost=lambda request_id: None)

    def clock(self) -> float:
        return self.now

    def request(self, name: str, *, lingers: bool) -> OwnedRequest:
        request = GenerationRequest(
            request_id=RequestId(name), model="m", prompt=(1,), sampling=SamplingParameters(max_tokens=4, seed=1), lingers=lingers
        )
        owned = OwnedRequest(request, ModelKey("m", "1"), cancel_in_mesh=self.cancel, clock=self.clock)
        owned.was_accepted()
        self.kept.add(owned)
        return owned

    def cancel(self, request_id: RequestId, choice: int | None) -> None:
        self.cancelled.append((request_id, choice))
        if choice is None:
            self.kept.remove(request_id).finish(None)


async def test_a_plain_request_ends_with_its_last_reader() -> None:
    gateway = Gateway()
    owned = gateway.request("a", lingers=False)
    one, other = owned.read(), owned.read()
    await one.close()
    await one.close()
    assert gateway.cancelled == []
    await other.close()
    assert gateway.cancelled == [("a", None)]


async def test_one_that_lingers_is_ended_once_nobody_has_read_it_for_long() -> None:
    gateway = Gateway()
    owned = gateway.request("a", lingers=True)
    await owned.read().close()
    gateway.now = LINGER_S
    assert gateway.kept.end_unread() == 0
    reader = owned.read()
    gateway.now = 3 * LINGER_S
    assert gateway.kept.end_unread() == 0, "somebody reads it again"
    await reader.close()
    gateway.now += LINGER_S + 0.1
    assert gateway.kept.end_unread() == 1
    assert gateway.cancelled == [("a", None)]


async def test_where_too_many_linger_the_oldest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_keeper, "MAX_LINGERING", 2)
    gateway = Gateway()
    for name in "abcd":
        gateway.now += 1.0
        await gateway.request(name, lingers=True).read().close()
    assert gateway.kept.end_unread() == 2
    assert gateway.cancelled == [("a", None), ("b", None)]


async def test_a_request_that_nobody_has_accepted_yet_does_not_linger() -> None:
    gateway = Gateway()
    request = gateway.request("a", lingers=True).request
    owned = OwnedRequest(request, ModelKey("m", "1"), cancel_in_mesh=gateway.cancel, clock=gateway.clock)
    await owned.read().close()
    assert gateway.cancelled == [("a", None)]


async def test_who_reads_on_is_told_that_another_reader_cancelled_it() -> None:
    gateway = Gateway()
    owned = gateway.request("a", lingers=True)
    one, other = owned.read(), owned.read()
    owned.deliver(0, NewTokens(first=0, tokens=(7,)))
    one.cancel()
    assert await one.next_events() == []
    assert [event.token for event in await other.next_events()] == [7]
    with pytest.raises(RequestFailed, match="cancelled"):
        await other.next_events()
