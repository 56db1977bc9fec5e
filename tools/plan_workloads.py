"""Workloads as a file: lengths by lognormal distributions, an objective each. `plan_workloads.json` holds thirteen known ones.

Their means are those that papers and traces give for ShareGPT, HumanEval and LongBench (DistServe), Azure's LLM traces of 2023
(Azure/AzurePublicDataset, CC-BY) and Mooncake's (kvcache-ai/Mooncake); the widths are rounded. No row of a data set is in it.
"""

from pathlib import Path
from typing import Literal

import msgspec

from common.simulation.goodput.workloads import Lengths, RequestClass, Workload
from common.values.errors import SettingsError
from common.values.objectives import Objectives

KNOWN = Path(__file__).with_name("plan_workloads.json")


class LengthsEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    distribution: Literal["lognormal"]
    mean: float
    sigma: float
    min: int
    max: int

    def lengths(self) -> Lengths:
        return Lengths(mean=self.mean, sigma=self.sigma, least=self.min, most=self.max)


class ObjectiveEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    ttft_ms: float
    tpot_ms: float
    ttft_stretch: float = 0.0


class WorkloadEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`share` counts where several are mixed."""

    name: str
    input_tokens: LengthsEntry
    output_tokens: LengthsEntry
    slo: ObjectiveEntry
    share: float = 1.0

    def request_class(self) -> RequestClass:
        slo = self.slo
        objectives = Objectives(ttft_s=slo.ttft_ms / 1000.0, tpot_s=slo.tpot_ms / 1000.0, ttft_stretch=slo.ttft_stretch)
        return RequestClass(
            name=self.name,
            prompt=self.input_tokens.lengths(),
            output=self.output_tokens.lengths(),
            objectives=objectives,
            share=self.share,
        )


def read_workloads(path: Path = KNOWN) -> list[WorkloadEntry]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[WorkloadEntry])
    except (OSError, msgspec.MsgspecError) as error:
        raise SettingsError(f"{path} has no workloads: {error}") from None


def mixed(names: list[str], path: Path = KNOWN, *, variation: float = 1.0) -> Workload:
    """Those of the names (all where there are none), by their shares."""
    entries = read_workloads(path)
    unknown = set(names) - {entry.name for entry in entries}
    if unknown or not entries:
        known = ", ".join(entry.name for entry in entries)
        raise SettingsError(f"--workload: {', '.join(sorted(unknown)) or 'nothing'} is not among {known}")
    chosen = [entry for entry in entries if entry.name in names or not names]
    return Workload(classes=tuple(entry.request_class() for entry in chosen), variation=variation)
