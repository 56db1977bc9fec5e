"""Objectives of a request: those that were asked for, and for the rest what the mesh can do, with room to share it.

A user notices slowness against what the same answer takes on an idle machine; so that, several times over, is the objective
where nobody named one.
"""

from common.policy.step_time import StepTime
from common.values.objectives import Objectives
from common.values.request_class import WantedSpeed

TTFT_STRETCH = 5.0
"""Times the unloaded prefill of the prompt."""
TRANSPORT_S = 0.1
"""Of every TTFT that is derived: the way to the mesh and back."""
TPOT_STRETCH = 3.0
"""Times a decode step of the request alone."""


def objectives_of(wanted: WantedSpeed, time: StepTime, prompt_tokens: int) -> Objectives:
    tpot_s = TPOT_STRETCH * time.decode.seconds(1, prompt_tokens) if wanted.tpot_s is None else wanted.tpot_s
    if wanted.ttft_s is not None:
        return Objectives(ttft_s=wanted.ttft_s, tpot_s=tpot_s)
    return Objectives(ttft_s=TRANSPORT_S, ttft_stretch=TTFT_STRETCH, tpot_s=tpot_s)
