"""Curves over sizes that double: numbers of any unit from zero up, with the range of each point. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from pipo.pages.charts import Frame, marker, svg

MARGIN = 0.35
"""Beside the outermost points, in doublings."""


@dataclass(frozen=True, slots=True)
class Spot:
    """A point with the range it was found in, and the words that show when the mouse rests on it."""

    x: float
    y: float
    low: float
    high: float
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Curve:
    """Spots in the order of x, joined. `dashed`: a bound, which has no dots. `style` is a CSS class of the page."""

    name: str
    style: str
    spots: Sequence[Spot]
    dashed: bool = False


def curve_chart(curves: Sequence[Curve], x_label: str, y_label: str, title: str) -> str:
    """All curves in one drawing, x by its logarithm with a tick at every size that occurs; no spots: no chart."""
    spots = [spot for curve in curves for spot in curve.spots]
    if not spots:
        return ""
    sizes = sorted({spot.x for spot in spots})
    x_range = (math.log2(sizes[0]) - MARGIN, math.log2(sizes[-1]) + MARGIN)
    top = 1.06 * max(spot.high for spot in spots) or 1.0
    frame = Frame(x_range, (0.0, top), x_label, y_label, {math.log2(size): f"{size:,g}" for size in sizes})
    body = [frame.axes()]
    for curve in sorted(curves, key=lambda one: not one.dashed):
        body += _drawn(frame, curve)
    return svg(body, title)


def _drawn(frame: Frame, curve: Curve) -> list[str]:
    ordered = sorted(curve.spots, key=lambda spot: spot.x)
    places = [(frame.x(math.log2(spot.x)), frame.y(spot.y)) for spot in ordered]
    dash = ' stroke-dasharray="5 5"' if curve.dashed else ""
    parts = []
    if len(places) == 1 and curve.dashed:
        (x, y) = places[0]
        places = [(x - 22, y), (x + 22, y)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts.append(f'<polyline class="line {curve.style}"{dash} points="{path}"/>')
    if curve.dashed:
        return parts
    for spot, (x, y) in zip(ordered, places, strict=True):
        low, high = frame.y(spot.low), frame.y(spot.high)
        parts.append(
            f'<g class="{curve.style}"><title>{escape(spot.hint)}</title>'
            f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>{marker(x, y, "circle")}</g>'
        )
    return parts
