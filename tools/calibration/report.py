"""What `segue calibrate` prints: the coefficients, how far they are off, and every point beside what the model says of it."""

from datetime import UTC, datetime

from common.policy.calibration import Calibration, CalibrationSubject, Residual, residuals
from common.policy.step_time import DecodeLine
from common.policy.step_time_fit import FitError


def calibration_report(calibration: Calibration) -> str:
    rows = residuals(calibration)
    fitted = [row for row in rows if " beside " not in row.what]
    worst = max(fitted, key=lambda row: abs(row.error))
    parts = [
        _headline(calibration),
        _points(rows),
        _coefficients(calibration),
        _errors(calibration),
        f"worst of the fitted points: {worst.what}: {_ms(worst.measured_s)} ms measured, {_ms(worst.predicted_s)} ms predicted",
        *(f"note: {note}" for note in calibration.notes),
    ]
    return "\n".join(part for part in parts if part)


def _headline(calibration: Calibration) -> str:
    subject = calibration.subject
    when = datetime.fromtimestamp(calibration.measured_at, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"{subject_line(subject)}; {when}, build {calibration.build}\n"


def subject_line(subject: CalibrationSubject) -> str:
    if subject.endpoint is not None:
        return f"{subject.model} at {subject.endpoint}, from outside"
    threads = f"{subject.threads} thread{'s' if subject.threads > 1 else ''}"
    return f"{subject.model}, {subject.dtype}, kernels {subject.kernels}, {subject.device}, {threads}; {subject.cpu}"


def _points(rows: list[Residual]) -> str:
    width = max(len(row.what) for row in rows)
    head = f"{'step':<{width}}  measured ms  predicted ms   error  spread"
    lines = [
        f"{row.what:<{width}}  {_ms(row.measured_s):>11}  {_ms(row.predicted_s):>12}  {row.error:>+6.1%}  {row.spread:>6.1%}"
        for row in rows
    ]
    return "\n".join([head, *lines, ""])


def _coefficients(calibration: Calibration) -> str:
    prefill, decode = calibration.step_time.prefill, calibration.step_time.decode
    lines = [
        f"prefill: {_ms(prefill.base_s)} ms + {prefill.per_token_s * 1e6:.2f} µs a token + {prefill.per_pair_s * 1e9:.3f} ns a pair; "
        f"saturated from {prefill.saturation_tokens} tokens on",
        f"decode:  {_line(decode.line)}",
    ]
    if decode.beyond is not None:
        lines.append(f"from {decode.knee} sequences on: {_line(decode.beyond)}")
    if calibration.subject.endpoint is not None:
        lines.append(
            f"beside the steps: a round trip of {_ms(calibration.round_trip_s)} ms, "
            f"and {_ms(calibration.request_overhead_s)} ms of the server a request"
        )
    return "\n".join(lines)


def _line(line: DecodeLine) -> str:
    return f"{_ms(line.base_s)} ms + {line.per_kv_token_s * 1e9:.1f} ns a cached token + {_ms(line.per_sequence_s)} ms a sequence"


def _errors(calibration: Calibration) -> str:
    fitted = calibration.fitted
    return (
        f"left out one by one: prefill {_error(fitted.prefill_error)}; decode {_error(fitted.decode_error)}; "
        f"confidence {fitted.confidence}"
    )


def _error(error: FitError) -> str:
    return f"{error.mean:.1%} off in the mean, {error.worst:.1%} at worst, of {error.samples} points"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"
