"""Charts: every figure is drawn where it belongs, words of others are only words, and nothing is drawn of nothing."""

import math
import re
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from pipo.evaluation.results import Bin
from pipo.pages.charts import Bar, Frame, Point, Series, bar_chart, point_chart, reliability_chart, ticks
from pipo.pages.curves import Curve, Spot, curve_chart

SVG = "{http://www.w3.org/2000/svg}"


def point(x: float, y: float, label: str = "") -> Point:
    return Point(x, y, y - 3, y + 3, label, f"hint of {label}")


@given(st.floats(-100, 100), st.floats(0.01, 200))
def test_ticks_are_few_and_inside(low: float, width: float) -> None:
    marks = ticks(low, low + width)
    assert 1 <= len(marks) <= 9
    assert all(low - 1e-6 <= mark <= low + width + 1e-6 for mark in marks)


def test_a_frame_maps_corners_to_corners() -> None:
    frame = Frame((1, 3), (0, 50), "x", "y")
    assert (frame.x(1), frame.x(3)) == (64, 600)
    assert (frame.y(50), frame.y(0)) == (18, 324)


def test_points_without_a_place_are_left_out() -> None:
    """A server that says nothing of steps gives NaN, and one NaN in a path makes a browser drop all of it."""
    series = [Series("PIPO", "s1", [point(1.0, 50), point(math.nan, 60), point(1.5, 40)], line=True)]
    chart = point_chart(series, "tokens per step", "avg@4, percent", "Accuracy")
    assert "nan" not in chart
    assert len(ElementTree.fromstring(chart).findall(f".//{SVG}circle")) == 2
    assert point_chart([Series("PIPO", "s1", [point(math.nan, 60)])], "x", "y", "z") == ""


def test_names_of_models_are_only_words() -> None:
    hostile = '"><script>alert(1)</script>'
    chart = point_chart([Series(hostile, "s1", [point(1, 50, hostile)])], hostile, hostile, hostile)
    assert "<script" not in chart
    ElementTree.fromstring(chart)


def test_every_method_has_a_shape_of_its_own() -> None:
    drawn = set()
    for shape in ("circle", "square", "triangle", "diamond"):
        chart = point_chart([Series("a", "s1", [point(1, 50)], shape=shape)], "x", "y", "z")
        drawn.add(re.search(r'class="dot" (.*?)/>', chart).group(1))  # type: ignore[union-attr]
    assert len(drawn) == 4


def test_reliability_is_drawn_at_its_confidence() -> None:
    bins = [Bin(0.0, 0.1, 10, 0.05, 20.0), Bin(0.9, 1.0, 90, 0.95, 80.0)]
    chart = reliability_chart(bins, "agree", "Calibration")
    frame = Frame((0.0, 1.0), (0.0, 1.04), "", "")
    dots = ElementTree.fromstring(chart).findall(f".//{SVG}circle")
    assert [dot.get("cx") for dot in dots] == [f"{frame.x(0.05):.1f}", f"{frame.x(0.95):.1f}"]
    assert [dot.get("cy") for dot in dots] == [f"{frame.y(0.2):.1f}", f"{frame.y(0.8):.1f}"]
    assert "confidence 0.9 to 1.0: 90 drafts, 80.0% agree" in chart


def test_bars_stand_on_the_axis() -> None:
    chart = bar_chart([("s1", [Bar(0, 1, 40.0, "forty"), Bar(1, 2, 0.0, "none")])], (0, 2), "x", "y", "Bars")
    [bar] = ElementTree.fromstring(chart).findall(f".//{SVG}rect")
    assert float(bar.get("y", "")) + float(bar.get("height", "")) == 324


def test_large_ticks_leave_room_for_the_label() -> None:
    """Fails when five digits run into the axis's label."""
    spots = [Spot(1, 20_000, 20_000, 20_000), Spot(2, 80_000, 80_000, 80_000)]
    drawn = curve_chart([Curve("pipo", "s1", spots)], "batch", "tokens/s", "title")
    assert ">80k<" in drawn
    assert "80000" not in drawn
