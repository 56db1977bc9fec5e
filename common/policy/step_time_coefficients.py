"""The step-time model to numbers and back: what a snapshot or a file carries is what predictions are made with."""

from common.policy.step_time import DecodeLine, DecodeTime, PrefillTime, StepTime
from common.values.step_coefficients import StepCoefficients


def coefficients_of(time: StepTime) -> StepCoefficients:
    beyond = time.decode.beyond
    return StepCoefficients(
        prefill_base_s=time.prefill.base_s,
        prefill_per_token_s=time.prefill.per_token_s,
        prefill_per_pair_s=time.prefill.per_pair_s,
        decode_base_s=time.decode.line.base_s,
        decode_per_kv_token_s=time.decode.line.per_kv_token_s,
        decode_per_sequence_s=time.decode.line.per_sequence_s,
        knee=time.decode.knee,
        beyond=None if beyond is None else (beyond.base_s, beyond.per_kv_token_s, beyond.per_sequence_s),
    )


def step_time_of(coefficients: StepCoefficients) -> StepTime:
    beyond = None if coefficients.beyond is None else _line(*coefficients.beyond)
    line = _line(coefficients.decode_base_s, coefficients.decode_per_kv_token_s, coefficients.decode_per_sequence_s)
    return StepTime(
        prefill=PrefillTime(
            base_s=coefficients.prefill_base_s,
            per_token_s=coefficients.prefill_per_token_s,
            per_pair_s=coefficients.prefill_per_pair_s,
        ),
        decode=DecodeTime(line=line, knee=coefficients.knee, beyond=beyond),
    )


def _line(base_s: float, per_kv_token_s: float, per_sequence_s: float) -> DecodeLine:
    return DecodeLine(base_s=base_s, per_kv_token_s=per_kv_token_s, per_sequence_s=per_sequence_s)
