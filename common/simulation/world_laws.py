"""Laws of a whole mesh once it is quiet: nothing is held, nobody waits, and what failed had a cause that really was there."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from common.protocol.stored_log import assemble, decode_entry
from common.simulation.fault_strength import FaultStrength
from common.simulation.simulated_client import SimulatedClient
from common.simulation.simulated_gateway import SimulatedGateway
from common.simulation.simulated_store import SimulatedStore
from common.simulation.simulated_worker import SimulatedWorker
from common.simulation.surroundings import Surroundings
from common.simulation.worker_shape import BLOCK, NAMES, Length
from common.values.errors import (
    BrokerUnavailable,
    InvariantBroken,
    NeverFits,
    Overloaded,
    RequestFailed,
    StoreUnavailable,
    StreamNotFound,
    Unavailable,
)
from common.values.ids import GatewayId, WorkerId


class JudgedWorld(Protocol):
    """What the laws look at."""

    @property
    def around(self) -> Surroundings: ...
    @property
    def strength(self) -> FaultStrength: ...
    @property
    def store(self) -> SimulatedStore: ...
    @property
    def workers(self) -> Mapping[WorkerId, SimulatedWorker]: ...
    @property
    def gateways(self) -> Mapping[GatewayId, SimulatedGateway]: ...
    @property
    def clients(self) -> Sequence[SimulatedClient]: ...
    @property
    def length(self) -> Length: ...


def check_end(world: JudgedWorld) -> None:
    for client in world.clients:
        _require(client.over, f"{client.request_id} has no end")
        if world.strength.single_faults <= 1:
            _require(client.resumes <= 1, f"{client.request_id} had to come back {client.resumes} times")
        if not client.cut and client.error is None and not client.cancelled:
            _check_stored(world, client)
    for worker in world.workers.values():
        worker.core.check_invariants()
        _require(worker.pool.held == 0, f"{worker.worker} still holds {worker.pool.held} blocks")
        _require(not worker.grants, f"{worker.worker} still grants blocks")
        _require(worker.core.desk.receiving.offers_queued == 0, f"{worker.worker} still queues offers")
    for gateway in world.gateways.values():
        _require(gateway.core.active == 0, f"{gateway.gateway} still follows requests")


def _check_stored(world: JudgedWorld, client: SimulatedClient) -> None:
    """What the store shows of a request that went well, where nothing happened to the store or to who wrote there."""
    counts = world.around.counts
    if counts["store_outage"] + counts["gateway_death"] + len(client.cancelled_choices) > 0:
        return
    fields = world.store.read(NAMES.request_key(client.request_id))
    state = None if fields is None else fields["state"].decode()
    _require(state == "ended", f"the record of {client.request_id} says {state}")
    log = assemble(decode_entry(data) for data in world.store.read_list(NAMES.log_key(client.request_id)))
    for choice, expected in client.expected.items():
        known = log[choice].new_tokens(with_logprobs=client.sampling.logprobs is not None)
        whole = list(known.tokens) == expected and known.ending is not None
        _require(whole, f"the log of {client.request_id} is not whole")


def check_failures(world: JudgedWorld) -> None:
    for client in world.clients:
        if client.error is not None and not _has_cause(world, client):
            raise InvariantBroken(f"{client.request_id} failed without a cause: {client.error!r}")


def _has_cause(world: JudgedWorld, client: SimulatedClient) -> bool:
    """What was accepted survives any single fault; a new request may be turned away while something is broken."""
    strength, counts = world.strength, world.around.counts
    several = strength.single_faults > 1 or strength.message_loss > 0.0
    match client.error:
        case RequestFailed(code="deadline_exceeded"):
            return client.deadline_s is not None
        case RequestFailed(code="cancelled"):
            return client.cancelled or (client.left_at is not None and not client.lingers)
        case StreamNotFound():
            return several and counts["store_emptied"] > 0
        case RequestFailed(code="request_poisoned"):
            return several
        case NeverFits():
            return _fits_not_everywhere(world, client)
        case Overloaded():
            return not client.accepted and counts["dispatch_full"] > 0
        case BrokerUnavailable():
            return not client.accepted and counts["outage"] + counts["partition"] > 0
        case StoreUnavailable():
            return not client.accepted and counts["store_outage"] > 0
        case Unavailable():
            return several
        case _:
            return False


def _fits_not_everywhere(world: JudgedWorld, client: SimulatedClient) -> bool:
    positions = min(len(client.prompt) + client.sampling.max_tokens, world.length.max_model_len)
    return -(-positions // BLOCK) > min(worker.shape.blocks for worker in world.workers.values())


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise InvariantBroken(what)
