"""Identities. Each is made by the side that owns the thing named and never reused."""

from dataclasses import dataclass
from typing import NewType

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)
GatewayId = NewType("GatewayId", str)
Incarnation = NewType("Incarnation", str)
"""One start of one process: a restarted worker keeps its id and gets a new incarnation."""
ReservationId = NewType("ReservationId", bytes)
"""Random, made by the receiver of a hand-off: the one-time token without which no block is served."""


@dataclass(frozen=True, slots=True, order=True)
class SequenceKey:
    """The unit that is scheduled, handed off and fenced: one choice of one request."""

    request_id: RequestId
    choice: int


@dataclass(frozen=True, slots=True, order=True)
class Owner:
    """The gateway that a sequence's tokens go to. `epoch` rises with every change of owner; a lower one is refused."""

    gateway: GatewayId
    incarnation: Incarnation
    epoch: int = 1


@dataclass(frozen=True, slots=True, order=True)
class ModelKey:
    """Workers that serve the same model form a group by this key.

    `revision` is a digest of weights, configuration and tokenizer, so equal keys mean equal answers.
    """

    name: str
    revision: str
