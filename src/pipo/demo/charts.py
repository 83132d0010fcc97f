"""The report's charts as inline SVG. Colours are CSS classes of the page, so light and dark both work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 620, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 18, 56


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
    """Points of one kind; `line` joins them. `style` is a CSS class of the page (`s1` … `s5`)."""

    name: str
    style: str
    points: Sequence[Point]
    line: bool = False


class Frame:
    """Maps data to the drawing area and draws axes with round ticks."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float], x_label: str, y_label: str) -> None:
        self.x_range, self.y_range = x_range, y_range
        self.x_label, self.y_label = x_label, y_label

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
        for value in ticks(*self.x_range):
            x = self.x(value)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 21}" text-anchor="middle">{value:g}</text>'
            )
        for value in ticks(*self.y_range):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
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


def accuracy_chart(series: Sequence[Series], x_label: str) -> str:
    """Accuracy against speed, with intervals."""
    points = [point for one in series for point in one.points if math.isfinite(point.x)]
    if not points:
        return ""
    x_low, x_high = min(p.x for p in points), max(p.x for p in points)
    margin = 0.08 * max(x_high - x_low, 0.1)
    y_low, y_high = min(p.low for p in points), max(p.high for p in points)
    frame = Frame(
        (x_low - margin, x_high + margin), (max(0.0, y_low - 4), min(104.0, y_high + 6)), x_label, "avg@4, percent"
    )
    body = [frame.axes()]
    for one in series:
        shown = [point for point in one.points if math.isfinite(point.x)]
        if one.line:
            path = " ".join(f"{frame.x(p.x):.1f},{frame.y(p.y):.1f}" for p in shown)
            body.append(f'<polyline class="line {one.style}" points="{path}"/>')
        body += [_marked(frame, point, one.style, below=index % 2 == 1) for index, point in enumerate(shown)]
    return _svg(body, "Accuracy against speed")


def _marked(frame: Frame, point: Point, style: str, below: bool) -> str:
    """A point with its interval; labels of neighbours go above and below in turn, so that they stay readable."""
    x, y = frame.x(point.x), frame.y(point.y)
    label_y = y + 19 if below else y - 9
    on_the_left = x > WIDTH - 120
    label_x, anchor = (x - 9, "end") if on_the_left else (x + 9, "start")
    return (
        f'<g class="{style}"><title>{escape(point.hint)}</title>'
        f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.y(point.low):.1f}" y2="{frame.y(point.high):.1f}"/>'
        f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="6"/>'
        f'<text class="mark" x="{label_x:.1f}" y="{label_y:.1f}" text-anchor="{anchor}">{escape(point.label)}</text></g>'
    )


@dataclass(frozen=True, slots=True)
class Bin:
    """Drafts whose confidence lies between `low` and `high`: their mean confidence, and the share that was right."""

    low: float
    high: float
    confidence: float
    right: float
    num_drafts: int


def calibration_bins(drafts: Sequence[tuple[float, bool]], num_bins: int = 10) -> list[Bin]:
    """Bins of equal width over the confidence; empty ones are left out."""
    bins = []
    for index in range(num_bins):
        low, high = index / num_bins, (index + 1) / num_bins
        inside = [(c, right) for c, right in drafts if low <= c < high or (c == 1.0 and index == num_bins - 1)]
        if inside:
            mean = sum(c for c, _ in inside) / len(inside)
            mean = min(max(mean, low), high)  # rounding can carry it out of its bin by the last bit
            bins.append(Bin(low, high, mean, sum(right for _, right in inside) / len(inside), len(inside)))
    return bins


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Mean gap between confidence and what came, weighted by drafts; NaN without drafts."""
    total = sum(one.num_drafts for one in bins)
    return sum(one.num_drafts * abs(one.confidence - one.right) for one in bins) / total if total else math.nan


def rank_quality(drafts: Sequence[tuple[float, bool]]) -> float:
    """AUC: how often a right draft has more confidence than a wrong one; NaN when either kind is missing."""
    ordered = sorted(drafts)
    num_right = sum(right for _, right in ordered)
    num_wrong = len(ordered) - num_right
    if not num_right or not num_wrong:
        return math.nan
    wins, wrong_below, index = 0.0, 0, 0
    while index < len(ordered):
        end = index
        while end < len(ordered) and ordered[end][0] == ordered[index][0]:
            end += 1
        right_here = sum(right for _, right in ordered[index:end])
        wrong_here = end - index - right_here
        wins += right_here * (wrong_below + wrong_here / 2)
        wrong_below += wrong_here
        index = end
    return wins / (num_right * num_wrong)


def calibration_chart(bins: Sequence[Bin]) -> str:
    """Share of right drafts against confidence; the size of a dot tells how many drafts it stands for."""
    frame = Frame((0.0, 1.0), (0.0, 1.04), "confidence of the gate", "drafts that are right")
    body = [frame.axes()]
    body.append(
        f'<line class="ideal" x1="{frame.x(0):.1f}" y1="{frame.y(0):.1f}" x2="{frame.x(1):.1f}" y2="{frame.y(1):.1f}"/>'
    )
    path = " ".join(f"{frame.x(one.confidence):.1f},{frame.y(one.right):.1f}" for one in bins)
    body.append(f'<polyline class="line s1" points="{path}"/>')
    most = max((one.num_drafts for one in bins), default=1)
    for one in bins:
        hint = f"confidence {one.low:.1f} to {one.high:.1f}: {one.num_drafts} drafts, {100 * one.right:.1f}% right"
        radius = 3 + 9 * math.sqrt(one.num_drafts / most)
        body.append(
            f'<g class="s1"><title>{hint}</title><circle class="dot soft" cx="{frame.x(one.confidence):.1f}" '
            f'cy="{frame.y(one.right):.1f}" r="{radius:.1f}"/></g>'
        )
    return _svg(body, "Calibration of the confidence head")


def histogram_chart(groups: Sequence[tuple[str, str, Sequence[float]]]) -> str:
    """Tokens per step of single samples: one outline per (name, style, values)."""
    low, high, num_bins = 1.0, 2.0, 20
    shares: list[list[float]] = []
    for _, _, values in groups:
        bins = [0] * num_bins
        for value in values:
            bins[min(num_bins - 1, max(0, int((value - low) / (high - low) * num_bins)))] += 1
        shares.append([100 * count / max(len(values), 1) for count in bins])
    top = max((max(group) for group in shares), default=1.0)
    frame = Frame((low, high), (0.0, max(top * 1.08, 1.0)), "tokens per step of a sample", "samples, percent")
    body = [frame.axes()]
    width = (high - low) / num_bins
    for (name, style, _), group in zip(groups, shares, strict=True):
        for index, share in enumerate(group):
            if share:
                x, y = frame.x(low + index * width), frame.y(share)
                body.append(
                    f'<rect class="bar {style}" x="{x + 0.5:.1f}" y="{y:.1f}" width="{frame.x(low + width) - frame.x(low) - 1:.1f}" '
                    f'height="{frame.y(0) - y:.1f}"><title>{escape(name)}: {share:.1f}%</title></rect>'
                )
    return _svg(body, "Tokens per step")


def _svg(body: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(body)}</svg>'
    )
