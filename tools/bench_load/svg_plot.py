"""Plots as inline SVG: axes, lines, bands, bars. Coordinates of the data in, one `<svg>` element out."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 40
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#65a30d")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """`low` and `high`, where given, are drawn as whiskers at each point. `marks`: a dot at each point."""

    name: str
    points: Sequence[tuple[float, float]]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    marks: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """From `begins` to `ends` in row `row`, of the colour `colour` (a place in the legend)."""

    row: int
    begins: float
    ends: float
    colour: int
    title: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Ranges of the axes, and what they show."""

    x_label: str
    y_label: str
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    height: int = HEIGHT

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return self.height - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (self.height - TOP - BOTTOM)


def line_plot(
    lines: Sequence[Line], *, x_label: str, y_label: str, y_range: tuple[float, float] | None = None, rule: float | None = None
) -> str:
    """`rule`: a dashed horizontal at that value."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    if not xs:
        return "<p>nothing to show</p>"
    low, high = y_range or _padded(min(ys), max(ys))
    x_low, x_high = _padded(min(0.0, *xs) if min(xs) >= 0 else min(xs), max(xs))
    frame = Frame(x_label=x_label, y_label=y_label, x_low=x_low, x_high=x_high, y_low=low, y_high=high)
    drawn = [part for number, line in enumerate(lines) for part in _line(frame, line, COLOURS[number % len(COLOURS)])]
    if rule is not None:
        y = frame.y(rule)
        drawn.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="rule"/>')
    return _svg(frame, drawn, [line.name for line in lines])


def bar_plot(bars: Sequence[Bar], *, x_label: str, y_label: str, legend: Sequence[str]) -> str:
    """A Gantt chart: rows downwards."""
    if not bars:
        return "<p>nothing to show</p>"
    rows = max(bar.row for bar in bars) + 1
    height = max(160, min(1200, rows * 7 + TOP + BOTTOM))
    _, x_high = _padded(0.0, max(bar.ends for bar in bars))
    x_low = min(0.0, *(bar.begins for bar in bars))
    frame = Frame(x_label=x_label, y_label=y_label, x_low=x_low, x_high=x_high, y_low=float(rows), y_high=0.0, height=height)
    thick = max(1.0, (height - TOP - BOTTOM) / rows * 0.8)
    drawn = [
        f'<rect x="{frame.x(bar.begins):.1f}" y="{frame.y(bar.row):.1f}" height="{thick:.1f}" '
        f'width="{max(0.3, frame.x(bar.ends) - frame.x(bar.begins)):.1f}" fill="{COLOURS[bar.colour % len(COLOURS)]}">'
        f"<title>{escape(bar.title)}</title></rect>"
        for bar in bars
    ]
    return _svg(frame, drawn, legend)


def _line(frame: Frame, line: Line, colour: str) -> Iterable[str]:
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in line.points)
    yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
    if line.marks:
        for x, y in line.points:
            shown = f"{escape(line.name)}: {x:.4g}, {y:.4g}"
            yield f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3" fill="{colour}"><title>{shown}</title></circle>'
    for (x, _), low, high in zip(line.points, line.low, line.high, strict=False):
        place = f"{frame.x(x):.1f}"
        yield f'<line x1="{place}" x2="{place}" y1="{frame.y(low):.1f}" y2="{frame.y(high):.1f}" stroke="{colour}" opacity=".5"/>'


def _svg(frame: Frame, drawn: Iterable[str], legend: Sequence[str]) -> str:
    parts = [f'<svg viewBox="0 0 {WIDTH} {frame.height}" role="img" aria-label="{escape(frame.y_label)} by {escape(frame.x_label)}">']
    for value in ticks(frame.x_low, frame.x_high):
        x = frame.x(value)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{frame.height - BOTTOM}" class="grid"/>')
        parts.append(f'<text x="{x:.1f}" y="{frame.height - BOTTOM + 14}" text-anchor="middle">{value:g}</text>')
    for value in ticks(min(frame.y_low, frame.y_high), max(frame.y_low, frame.y_high)):
        y = frame.y(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    middle = (TOP + frame.height - BOTTOM) / 2
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{frame.height - 6}" text-anchor="middle">{escape(frame.x_label)}</text>')
    parts.append(f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(frame.y_label)}</text>')
    keys = "".join(
        f'<span><i style="background:{COLOURS[number % len(COLOURS)]}"></i>{escape(name)}</span>' for number, name in enumerate(legend)
    )
    return "".join([*parts, *drawn, f'</svg><p class="legend">{keys}</p>'])


def ticks(low: float, high: float) -> list[float]:
    """Five or so round values within a range."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 10) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _padded(low: float, high: float) -> tuple[float, float]:
    return (low, high + (high - low) * 0.03) if high > low else (low - 0.5, high + 0.5)
