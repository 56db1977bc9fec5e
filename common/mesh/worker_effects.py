"""What a worker's core asks its shell to do. The outcome of each comes back as the next event."""

from dataclasses import dataclass

from common.mesh.engine_values import FilledBlock
from common.protocol.messages import ControlMessage, FrameEntry, SequenceNotice
from common.values.ids import GatewayId, ReservationId, WorkerId
from common.values.transfer import BlockSource


@dataclass(frozen=True, slots=True, kw_only=True)
class SendTokens:
    """One frame for one gateway."""

    gateway: GatewayId
    entries: tuple[FrameEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SendNotices:
    """One frame without tokens for one gateway."""

    gateway: GatewayId
    notices: tuple[SequenceNotice, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnounceSuspect:
    """Tell the gateway, and answer with `on_announced(ticket)` once the broker has it, or after a bounded time."""

    ticket: int
    gateway: GatewayId
    notice: SequenceNotice


@dataclass(frozen=True, slots=True, kw_only=True)
class SendControl:
    peer: WorkerId
    message: ControlMessage


@dataclass(frozen=True, slots=True, kw_only=True)
class SealBlocks:
    """Zero the tails, compute the checksums; answer with `on_sealed(ticket, …)` in any case: the blocks stay pinned until then."""

    ticket: int
    blocks: tuple[FilledBlock, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PullBlocks:
    """Copy blocks out of a peer's region; answer with `on_pulled(ticket, …)`, whatever becomes of it."""

    ticket: int
    peer: WorkerId
    reservation: ReservationId
    blocks: tuple[BlockSource, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantBlocks:
    """Block → generation: what the holder of the reservation may read from now on."""

    reservation: ReservationId
    blocks: dict[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RevokeGrant:
    reservation: ReservationId


@dataclass(frozen=True, slots=True, kw_only=True)
class ObserveHandoff:
    """A hand-off has succeeded: `exposed_s` passed between the first token here and the receiver's ACK, the part of the
    transfer that prefill did not hide."""

    exposed_s: float


WorkerEffect = (
    SendTokens | SendNotices | AnnounceSuspect | SendControl | SealBlocks | PullBlocks | GrantBlocks | RevokeGrant | ObserveHandoff
)
