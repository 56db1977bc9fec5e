"""Writing settings to a file for a child process: nothing secret is then on a command line or in an environment."""

from pathlib import Path

from common.runtime.settings_sources import settings_of


def to_file(path: Path, *groups: object) -> None:
    """Write groups of settings as a TOML file of mode 0600 that `--config` reads back to equal groups."""
    lines = [f"{item.key} = {_toml(getattr(group, item.field))}" for group in groups for item in settings_of(type(group))]
    path.touch(mode=0o600)
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _toml(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case tuple():
            return "[" + ", ".join(_toml(item) for item in value) + "]"
        case None:
            return '"auto"'
        case _:
            escaped = "".join(f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else c for c in str(value).replace("\\", "\\\\"))
            return '"' + escaped.replace('"', '\\"') + '"'
