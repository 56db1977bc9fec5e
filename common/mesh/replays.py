"""The answer to a gateway that misses tokens, or wants to know what became of a sequence; this is also how it adopts one."""

from common.mesh.sequence_engine import SequenceEngine
from common.mesh.sequence_life import Phase
from common.protocol.messages import ReplayEntry, ReplayItem, SequenceState
from common.protocol.token_log import SequenceLog, TokenLogs
from common.values.ids import Owner, RequestId, SequenceKey


class Replays:
    """One per worker."""

    def __init__(self, logs: TokenLogs, engine: SequenceEngine) -> None:
        self._logs = logs
        self._engine = engine

    def answer(self, item: ReplayItem, owner: Owner) -> ReplayEntry:
        key = SequenceKey(RequestId(item.request_id), item.choice)
        log = self._logs.get(key)
        if log is None or log.attempt != item.attempt:
            return ReplayEntry(request_id=item.request_id, choice=item.choice, attempt=item.attempt, state="unknown")
        if log.owner.epoch > item.epoch:
            return ReplayEntry(request_id=item.request_id, choice=item.choice, attempt=item.attempt, state="adopted")
        if owner.gateway:
            log.take_owner(owner)
        return ReplayEntry(
            request_id=item.request_id,
            choice=item.choice,
            attempt=item.attempt,
            state=self._state(key, log),
            new=log.since(item.next_index),
            moved_to=log.moved_to,
        )

    def _state(self, key: SequenceKey, log: SequenceLog) -> SequenceState:
        if log.state in ("queued", "running", "preempted") and self._engine.phase(key) is Phase.RUNNING:
            return "running"
        return log.state
