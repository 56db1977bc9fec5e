"""What a worker's shell is given: who it is, and the ports that it stands on."""

from dataclasses import dataclass

from common.ports.broker import Broker
from common.ports.kv_transport import KvRegion, KvTransport
from common.ports.peers import PeerNetwork
from common.ports.state_store import StateStore
from common.ports.step_engine import StepEngine
from common.values.ids import Incarnation, ModelKey, WorkerId
from common.values.kv_layout import Fingerprint
from common.values.model_card import ModelCard
from common.values.worker import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerIdentity:
    """What does not change while the process lives."""

    worker: WorkerId
    incarnation: Incarnation
    role: Role
    card: ModelCard
    fingerprint: Fingerprint
    max_num_seqs: int
    drain_s: float
    strict_kernels: bool = False

    @property
    def model(self) -> ModelKey:
        return self.card.model


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerWorld:
    """The ports that a worker stands on."""

    broker: Broker
    store: StateStore
    network: PeerNetwork
    transport: KvTransport
    region: KvRegion
    step_engine: StepEngine
