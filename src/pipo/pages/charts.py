"""Charts as inline SVG. Colours are CSS classes of the page, so light and dark both work. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from pipo.reliability import Bin

WIDTH, HEIGHT = 620, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 18, 56
END_LINE = 15

Shape = Literal["circle", "square", "triangle", "diamond"]
Range = tuple[float, float]


def _short(value: float) -> str:
    """A tick's number, in the room that there is beside the axis."""
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"


@dataclass(frozen=True, slots=True)
class Point:
    """A point with its 95% interval in y, and the words that show when the mouse rests on it."""

    x: float
    y: float
    low: float
    high: float
    label: str
    hint: str


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one kind; `line` joins them. `style` is a CSS class of the page (`s1` … `s8`)."""

    name: str
    style: str
    points: Sequence[Point]
    line: bool = False
    shape: Shape = "circle"
    end: str = ""
    """Written behind the last point."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar over [low, high)."""

    low: float
    high: float
    height: float
    hint: str


class Frame:
    """Maps data to the drawing area and draws axes with round ticks, or at `x_ticks` with words of their own."""

    def __init__(
        self, x_range: Range, y_range: Range, x_label: str, y_label: str, x_ticks: Mapping[float, str] | None = None
    ) -> None:
        self.x_range, self.y_range = x_range, y_range
        self.x_label, self.y_label = x_label, y_label
        self.x_ticks = {value: f"{value:g}" for value in ticks(*x_range)} if x_ticks is None else x_ticks

    def x(self, value: float) -> float:
        """Data x to pixels."""
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Data y to pixels."""
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def axes(self) -> str:
        """Grid, ticks and axis titles."""
        parts = []
        for value, text in self.x_ticks.items():
            x = self.x(value)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 21}" text-anchor="middle">{escape(text)}</text>'
            )
        for value in ticks(*self.y_range):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>')
        middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
        parts.append(
            f'<text class="axis" x="{middle_x}" y="{HEIGHT - 8}" text-anchor="middle">{escape(self.x_label)}</text>'
        )
        parts.append(
            f'<text class="axis" x="14" y="{middle_y}" text-anchor="middle" transform="rotate(-90 14 {middle_y})">'
            f"{escape(self.y_label)}</text>"
        )
        return "".join(parts)


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers from `low` to `high`, at most about `most` of them."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def point_chart(
    series: Sequence[Series], x_label: str, y_label: str, title: str, x_ticks: Mapping[float, str] | None = None
) -> str:
    """Percentages with intervals, against anything. Points without a place are left out; no points: no chart."""
    shown = [[p for p in one.points if math.isfinite(p.x) and math.isfinite(p.y)] for one in series]
    points = [point for some in shown for point in some]
    if not points:
        return ""
    x_low, x_high = min(p.x for p in points), max(p.x for p in points)
    margin = 0.08 * max(x_high - x_low, 0.1)
    y_low, y_high = min(p.low for p in points), max(p.high for p in points)
    y_range = (max(0.0, y_low - 4), min(104.0, y_high + 6))
    x_range = (x_low - margin, x_high + margin * (1.6 if any(one.end for one in series) else 1.0))
    if x_ticks is not None:
        x_ticks = {value: text for value, text in x_ticks.items() if x_range[0] <= value <= x_range[1]}
    frame = Frame(x_range, y_range, x_label, y_label, x_ticks)
    body = [frame.axes()]
    for one, some in zip(series, shown, strict=True):
        if one.line:
            path = " ".join(f"{frame.x(p.x):.1f},{frame.y(p.y):.1f}" for p in some)
            body.append(f'<polyline class="line {one.style}" points="{path}"/>')
        body += [_marked(frame, point, one, below=index % 2 == 1) for index, point in enumerate(some)]
    body += _ends(frame, [(some[-1], one.end) for one, some in zip(series, shown, strict=True) if some and one.end])
    return svg(body, title)


def _ends(frame: Frame, ends: Sequence[tuple[Point, str]]) -> list[str]:
    """What is written behind lines, from the lowest up, each at least a line above the one before."""
    parts = []
    free = math.inf
    for point, text in sorted(ends, key=lambda end: end[0].y):
        y = min(frame.y(point.y) + 5, free)
        parts.append(f'<text class="mark" x="{frame.x(point.x) + 12:.1f}" y="{y:.1f}">{escape(text)}</text>')
        free = y - END_LINE
    return parts


def _marked(frame: Frame, point: Point, series: Series, below: bool) -> str:
    """A point with its interval; labels of neighbours go above and below in turn, so that they stay readable."""
    x, y = frame.x(point.x), frame.y(point.y)
    label_y = y + 19 if below else y - 9
    on_the_left = x > WIDTH - 120
    label_x, anchor = (x - 9, "end") if on_the_left else (x + 9, "start")
    return (
        f'<g class="{series.style}"><title>{escape(point.hint)}</title>'
        f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.y(point.low):.1f}" y2="{frame.y(point.high):.1f}"/>'
        f"{marker(x, y, series.shape)}"
        f'<text class="mark" x="{label_x:.1f}" y="{label_y:.1f}" text-anchor="{anchor}">{escape(point.label)}</text></g>'
    )


def marker(x: float, y: float, shape: Shape) -> str:
    """What stands for a point, at pixels."""
    if shape == "circle":
        return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="6"/>'
    corners: list[tuple[float, float]] = {
        "square": [(-5.4, -5.4), (5.4, -5.4), (5.4, 5.4), (-5.4, 5.4)],
        "triangle": [(0, -7.2), (6.8, 5.2), (-6.8, 5.2)],
        "diamond": [(0, -7.6), (7.6, 0), (0, 7.6), (-7.6, 0)],
    }[shape]
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon class="dot" points="{path}"/>'


def reliability_chart(bins: Sequence[Bin], meaning: str, title: str) -> str:
    """What came of drafts against their confidence; the size of a dot tells how many drafts it stands for.

    Args:
        meaning: what the share counts, as in "drafts that are right".
    """
    frame = Frame((0.0, 1.0), (0.0, 1.04), "confidence of the gate", f"drafts that {meaning}")
    body = [frame.axes()]
    body.append(
        f'<line class="ideal" x1="{frame.x(0):.1f}" y1="{frame.y(0):.1f}" x2="{frame.x(1):.1f}" y2="{frame.y(1):.1f}"/>'
    )
    path = " ".join(f"{frame.x(one.mean):.1f},{frame.y(one.share / 100):.1f}" for one in bins)
    body.append(f'<polyline class="line s1" points="{path}"/>')
    most = max((one.count for one in bins), default=1)
    for one in bins:
        words = meaning.removeprefix("are ")
        hint = f"confidence {one.low:.1f} to {one.high:.1f}: {one.count} drafts, {one.share:.1f}% {words}"
        radius = 3 + 9 * math.sqrt(one.count / most)
        body.append(
            f'<g class="s1"><title>{hint}</title><circle class="dot soft" cx="{frame.x(one.mean):.1f}" '
            f'cy="{frame.y(one.share / 100):.1f}" r="{radius:.1f}"/></g>'
        )
    return svg(body, title)


def bar_chart(
    groups: Sequence[tuple[str, Sequence[Bar]]],
    x_range: Range,
    x_label: str,
    y_label: str,
    title: str,
    x_ticks: Mapping[float, str] | None = None,
) -> str:
    """Bars, of each group in its CSS class; groups lie over one another. Bars without height are left out."""
    top = max((bar.height for _, bars in groups for bar in bars), default=1.0)
    frame = Frame(x_range, (0.0, max(top * 1.08, 1.0)), x_label, y_label, x_ticks)
    body = [frame.axes()]
    for style, bars in groups:
        for bar in bars:
            if bar.height:
                x, y = frame.x(bar.low), frame.y(bar.height)
                body.append(
                    f'<rect class="bar {style}" x="{x + 0.5:.1f}" y="{y:.1f}" width="{frame.x(bar.high) - x - 1:.1f}" '
                    f'height="{frame.y(0) - y:.1f}"><title>{escape(bar.hint)}</title></rect>'
                )
    return svg(body, title)


def svg(body: Sequence[str], title: str) -> str:
    """A drawing of its parts."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(body)}</svg>'
    )
