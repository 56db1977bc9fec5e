"""How tokens and notices leave a worker: one frame a step and gateway. A frame that cannot leave is replayed later."""

import logging

from common.protocol.messages import FrameEntry, SequenceNotice, TokenFrame, encode
from common.protocol.subjects import Names
from common.runtime.worker_parts import WorkerIdentity, WorkerWorld
from common.values.errors import BrokerUnavailable, PayloadTooLarge
from common.values.ids import GatewayId

logger = logging.getLogger(__name__)


class FrameSender:
    """One per worker."""

    def __init__(self, identity: WorkerIdentity, world: WorkerWorld, names: Names) -> None:
        self._identity = identity
        self._world = world
        self._names = names

    def send_tokens(self, gateway: GatewayId, entries: tuple[FrameEntry, ...]) -> None:
        """One frame, or several where it would pass the broker's limit. A frame that cannot leave is replayed later."""
        identity = self._identity
        frame = TokenFrame(worker=identity.worker, incarnation=identity.incarnation, entries=list(entries))
        payload = encode(frame)
        if len(payload) > self._world.broker.max_payload_bytes and len(entries) > 1:
            half = len(entries) // 2
            self.send_tokens(gateway, entries[:half])
            self.send_tokens(gateway, entries[half:])
            return
        try:
            self._world.broker.publish(self._names.gateway_tokens(gateway), payload)
        except (BrokerUnavailable, PayloadTooLarge) as error:
            logger.warning("frame_lost", extra={"fields": {"gateway": gateway, "reason": str(error)}})

    def send_notices(self, gateway: GatewayId, notices: tuple[SequenceNotice, ...]) -> None:
        identity = self._identity
        frame = TokenFrame(worker=identity.worker, incarnation=identity.incarnation, entries=[], notices=list(notices))
        try:
            self._world.broker.publish(self._names.gateway_tokens(gateway), encode(frame))
        except BrokerUnavailable as error:
            logger.warning("notice_lost", extra={"fields": {"gateway": gateway, "reason": str(error)}})
