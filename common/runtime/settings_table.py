"""The table of all settings, generated from their declarations, for `segue settings`, `--help` and the documents."""

import textwrap
from collections.abc import Sequence

from common.runtime.settings_sources import Setting


def help_text(settings: Sequence[Setting], *, width: int = 100) -> str:
    """One paragraph a setting: flag, what it takes, default, meaning."""
    lines = []
    for item in settings:
        takes = "" if item.kind.switch else f" {item.kind.takes}"
        flag = f"{item.flag} / --no-{item.flag[2:]}" if item.kind.switch else item.flag
        lines.append(f"  {flag}")
        meaning = f"{item.means} (default: {_default(item)}{';' if takes else ''}{' takes' + takes if takes else ''})"
        lines.append(textwrap.fill(meaning, width, initial_indent=" " * 8, subsequent_indent=" " * 8))
    return "\n".join(lines)


def markdown_table(settings: Sequence[Setting]) -> str:
    """Name in files, flag, variable, default, meaning: a row a setting."""
    rows = ["| file | flag | environment | default | what it is | takes |", "| --- | --- | --- | --- | --- | --- |"]
    for item in settings:
        cells = [f"`{item.key}`", f"`{item.flag}`", f"`{item.variable}`", _default(item), item.means, item.kind.takes]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _default(item: Setting) -> str:
    return item.shown_default or "none"
