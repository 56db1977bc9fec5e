"""How the reports of the engine's commands are laid out: tables that read in a terminal and in Markdown."""

from collections.abc import Sequence


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned, so that it reads in a terminal too."""
    widths = [max(len(line[place]) for line in [columns, *rows]) for place in range(len(columns))]
    ruled = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in [columns, ruled, *rows]
    )


def case_names(columns: Sequence[tuple[int, int]], kind: str) -> list[str]:
    """`columns` are (tokens, batch)."""
    return [str(tokens) if kind == "prefill" else f"b{batch} c{tokens}" for tokens, batch in columns]
