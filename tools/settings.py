"""`segue settings`: every setting of every service, as tables in Markdown, generated from their declarations."""

from collections.abc import Sequence

from common.runtime.settings import GatewaySettings, MeshSettings, WorkerSettings
from common.runtime.settings_serve import ServeSettings
from common.runtime.settings_sources import settings_of
from common.runtime.settings_table import markdown_table

_GROUPS = (
    ("Every service", MeshSettings),
    ("The gateway", GatewaySettings),
    ("A worker", WorkerSettings),
    ("`segue serve`, which passes those of the gateway and of the workers on", ServeSettings),
)
_ORDER = "Defaults < file (`--config FILE`, TOML or YAML) < environment < flags. A switch is turned off by `--no-…`."


def main(arguments: Sequence[str]) -> int:
    if arguments:
        print("usage: segue settings")
        return 0 if arguments[0] in ("-h", "--help") else 2
    print(all_tables())
    return 0


def all_tables() -> str:
    parts = [_ORDER]
    parts += [f"## {title}\n\n{markdown_table(settings_of(group))}" for title, group in _GROUPS]
    return "\n\n".join(parts)
