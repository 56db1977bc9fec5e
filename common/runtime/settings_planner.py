"""The settings of the planner: whether it acts or only advises, how often it looks, and where it writes its decisions."""

from dataclasses import dataclass
from typing import Literal, cast

from common.runtime.settings import MeshSettings
from common.runtime.settings_kinds import IDENTIFIER, PORT, TEXT, auto_or, number_of_seconds, one_of, whole
from common.runtime.settings_sources import setting
from common.values.errors import SettingsError

PlannerMode = Literal["on", "advise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerSettings:
    """Several planners of one mesh: one acts, the others decide along and send nothing."""

    mesh: MeshSettings
    planner_id: str | None = setting(auto_or(IDENTIFIER), None, "id of this planner", shown_default="random")
    planner: str = setting(
        one_of("on", "advise"), "advise", "`on` changes roles of workers; `advise` publishes and logs what it would do"
    )
    planner_interval_s: float = setting(number_of_seconds(), 1.0, "how often the planner looks at the mesh", key="planner_interval")
    decision_log: str | None = setting(
        auto_or(TEXT), None, "file for every decision with its inputs, one JSON object a line", shown_default="none"
    )
    max_num_batched_tokens: int = setting(whole(1, 1 << 20), 256, "tokens of one step of the workers: prompt chunks and decode rows")
    host: str = setting(TEXT, "127.0.0.1", "address of /metrics, /health and /readyz")
    status_port: int | None = setting(
        auto_or(PORT), None, "port of /metrics, /health and /readyz; 0 takes a free one", shown_default="none"
    )

    @property
    def id(self) -> str:
        """`parse_planner_settings` has filled it in."""
        if self.planner_id is None:
            raise SettingsError("planner_id is not set")
        return self.planner_id

    @property
    def mode(self) -> PlannerMode:
        return cast("PlannerMode", self.planner)
