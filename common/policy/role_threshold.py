"""The rule that roles are usually changed by, as a baseline: the phase that is above its threshold takes a worker of the one that
is below. It looks at what is there now, and at nothing that a change would do."""

from dataclasses import dataclass

from common.policy.role_view import MeshView, RoleMove


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdRule:
    """`queue_high_s`, `queue_low_s`: of prompts, a prefill worker. `kv_high`, `kv_low`: the share of their KV that decode workers
    read. `step_high_s`, `step_low_s`: of a decode step."""

    queue_high_s: float
    queue_low_s: float
    kv_high: float = 0.8
    kv_low: float = 0.5
    step_high_s: float
    step_low_s: float
    cooldown_s: float = 10.0


class ThresholdControl:
    def __init__(self, rule: ThresholdRule) -> None:
        self._rule = rule
        self._changed_at: float | None = None

    def decide(self, view: MeshView) -> RoleMove | None:
        rule = self._rule
        prefill, decode = view.prefill, view.decode
        if not prefill or not decode or any(worker.changing for worker in view.workers):
            return None
        if self._changed_at is not None and view.now - self._changed_at < rule.cooldown_s:
            return None
        queue_s = sum(worker.prefill_queue_s for worker in prefill) / len(prefill)
        kv = sum(worker.decoding_kv_tokens for worker in decode) / sum(worker.kv_tokens for worker in decode)
        steps = [view.step_time.decode.seconds(worker.decoding, worker.decoding_kv_tokens) for worker in decode]
        step_s = sum(steps) / len(steps)
        move = None
        if queue_s > rule.queue_high_s and kv < rule.kv_low and step_s < rule.step_low_s and len(decode) > 1:
            giver = min(decode, key=lambda worker: (worker.decoding_kv_tokens, worker.worker))
            move = RoleMove(worker=giver.worker, role="prefill")
        elif queue_s < rule.queue_low_s and (kv > rule.kv_high or step_s > rule.step_high_s) and len(prefill) > 1:
            giver = min(prefill, key=lambda worker: (worker.prefill_queue_s, worker.worker))
            move = RoleMove(worker=giver.worker, role="decode")
        if move is not None:
            self._changed_at = view.now
        return move
