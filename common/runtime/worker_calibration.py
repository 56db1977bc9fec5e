"""Which calibration is a worker's: the one of its CPU, weights, dtype, kernels and threads."""

from common.policy.calibration import CalibrationSubject
from common.runtime.host_cpu import host_cpu
from common.runtime.settings import WorkerSettings
from common.runtime.worker_engine import WorkerModel


def calibration_subject(settings: WorkerSettings, model: WorkerModel) -> CalibrationSubject:
    """The synthetic engine is as quick as its settings say, whatever computes it."""
    fingerprint = model.fingerprint
    kernels = fingerprint.kernels
    if settings.engine_kind == "synthetic":
        times = (settings.synthetic_step_s, settings.synthetic_prefill_token_s, settings.synthetic_decode_row_s)
        kernels = "synthetic " + " ".join(f"{seconds:g}" for seconds in times)
    return CalibrationSubject(
        model=model.card.model.name,
        cpu=host_cpu().describe(),
        weights=fingerprint.weights,
        dtype=model.dtype,
        kernels=kernels,
        device=settings.device,
        threads=settings.threads or len(settings.cores or (0,)),
    )
