"""A worker's snapshot: what it tells the mesh of itself, put together from its core, its links and its meter."""

import os

from common.mesh.worker import WorkerCore
from common.policy.step_time_coefficients import coefficients_of
from common.runtime.peer_links import PeerLinks
from common.runtime.step_meter import StepMeter
from common.runtime.worker_parts import WorkerIdentity
from common.values.worker import WorkerSnapshot, WorkerState


def snapshot_of(
    identity: WorkerIdentity,
    core: WorkerCore,
    meter: StepMeter,
    links: PeerLinks,
    *,
    state: WorkerState,
    number: int,
    address: tuple[str, int],
    now: float,
) -> WorkerSnapshot:
    """`address` is that of its control connections."""
    load, pace, step_time, transfer = core.load(), core.pace(now), core.step_time, core.transfer_time
    return WorkerSnapshot(
        worker=identity.worker,
        incarnation=identity.incarnation,
        model=identity.model,
        role=core.role,
        state=state,
        sequence_number=number,
        control_host=address[0],
        control_port=address[1],
        fingerprint=identity.fingerprint,
        max_model_len=identity.card.max_model_len,
        max_num_seqs=identity.max_num_seqs,
        blocks_total=load.blocks_total,
        blocks_free=load.blocks_free,
        blocks_cached=load.blocks_cached,
        waiting=load.waiting + core.desk.receiving.offers_queued,
        running=load.running + load.held,
        queued_tokens=load.queued_tokens,
        seconds_per_prefill_token=meter.seconds_per_prefill_token,
        seconds_per_step=meter.seconds_per_step,
        peers=links.tiers(),
        unpaired=dict(links.unpaired),
        process_id=os.getpid(),
        step_time=None if step_time is None else coefficients_of(step_time),
        prefill_queue_s=pace.prefill_queue_s,
        decoding=pace.decoding,
        decoding_kv_tokens=pace.decoding_kv_tokens,
        stream_slack_s=pace.stream_slack_s,
        tokens_left=pace.tokens_left,
        transfer_base_s=transfer.base_s,
        transfer_per_token_s=transfer.per_token_s,
        reserved_tokens_free=pace.reserved_tokens_free,
        changing=core.changing,
        role_decision=core.role_decision,
    )
