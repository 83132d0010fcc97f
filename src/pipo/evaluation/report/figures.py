"""Which chart shows what: the report's figures, drawn from entries. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pipo.evaluation.cells import Calibration, Cell
from pipo.evaluation.report.entries import Entry, spread
from pipo.evaluation.settings import Method
from pipo.evaluation.statistics import Estimate
from pipo.pages.charts import (
    Bar,
    Point,
    Series,
    Shape,
    bar_chart,
    marker,
    point_chart,
    reliability_chart,
)
from pipo.reliability import Bin

SHAPES: Mapping[Method, Shape] = {
    "regular": "square",
    "speculative": "triangle",
    "mtp": "diamond",
    "pipo": "circle",
}
METHOD_STYLES: Mapping[Method, str] = {"regular": "s2", "speculative": "s4", "mtp": "s3", "pipo": "s1"}
MODEL_STYLES = ("s2", "s1", "s4", "s3", "s6", "s7", "s8", "s5")
MEANINGS = {"right": "are right", "agreed": "the model then wrote itself"}
LOG_FROM = 4.0
"""An axis is logarithmic where its largest value is so many times its smallest."""


@dataclass(frozen=True)
class Figure:
    """A chart with its heading."""

    title: str
    chart: Markup
    note: str = ""


@dataclass(frozen=True)
class Key:
    """What a colour and a shape stand for."""

    text: str
    style: str
    mark: Markup


class Figures:
    """Draws the entries of a page, each model and method in a look of its own.

    One model's methods differ in colour and shape; several models differ in colour, methods in shape.
    """

    def __init__(self, entries: Sequence[Entry], tasks: Mapping[str, str], accuracy: str) -> None:
        """`tasks` are titles by name; `accuracy` is what the measure of accuracy is called, as in `avg@4`."""
        self.entries, self.tasks, self.accuracy = entries, tasks, accuracy
        self.models = list(dict.fromkeys(entry.model for entry in entries))

    def style(self, entry: Entry) -> str:
        """The CSS class of an entry's colour."""
        if not entry.several:
            return METHOD_STYLES[entry.condition.method]
        return MODEL_STYLES[self.models.index(entry.model) % len(MODEL_STYLES)]

    def key(self, entries: Sequence[Entry], by_threshold: bool = False) -> list[Key]:
        """The legend, a line an entry; `by_threshold`: PIPO's thresholds share one."""
        keys: dict[str, Key] = {}
        for entry in entries:
            text = entry.label
            if by_threshold and entry.condition.method == "pipo":
                text = f"{entry.model} · PIPO, by threshold" if entry.several else "PIPO, by threshold"
            mark = Markup(marker(0, 0, SHAPES[entry.condition.method]))
            keys.setdefault(text, Key(text, self.style(entry), mark))
        return list(keys.values())

    def trade(self, place: Callable[[Cell], float], x_label: str) -> list[Figure]:
        """Accuracy against speed: over all tasks where there are several, then in each."""
        parts: list[tuple[str, list[str]]] = [(title, [task]) for task, title in self.tasks.items()]
        if len(parts) > 1:
            parts.insert(0, ("All tasks", list(self.tasks)))
        figures = []
        for title, tasks in parts:
            chart = self._trade_chart(title, tasks, place, x_label)
            figures.append(
                Figure(title, Markup(chart), "" if chart else f"Nothing to draw: accuracy or {x_label} is not known.")
            )
        return figures

    def _trade_chart(self, title: str, tasks: Sequence[str], place: Callable[[Cell], float], x_label: str) -> str:
        groups: dict[tuple[str, Method], list[tuple[Entry, Point]]] = {}
        for entry in self.entries:
            accuracy = entry.average(tasks, lambda cell: cell.avg_at_k)
            if accuracy is None:
                continue
            x = entry.mean(tasks, place)
            hint = f"{entry.label}: {self.accuracy} {estimate_text(accuracy)}, {x:,.4g} {x_label}"
            threshold = entry.condition.threshold
            label = "" if threshold is None else f"{threshold:g}" if threshold <= 1 else "never"
            point = Point(x, accuracy.value, *_ends(accuracy), label, hint)
            groups.setdefault((entry.model, entry.condition.method), []).append((entry, point))
        series = [
            Series(some[0][0].label, self.style(some[0][0]), [p for _, p in some], len(some) > 1, SHAPES[method])
            for (_, method), some in groups.items()
        ]
        return point_chart(series, x_label, f"{self.accuracy}, percent", f"{title}: accuracy against {x_label}")

    def budgets(self) -> list[Figure]:
        """Accuracy when a sample may have so many tokens; tasks with one budget only are left out."""
        found = []
        for task, title in self.tasks.items():
            shown = [(entry, entry.cells[task].by_budget) for entry in spread(self.entries) if task in entry.cells]
            if max((len(by_budget) for _, by_budget in shown), default=0) < 2:
                continue
            lines = [
                (
                    entry,
                    [
                        (
                            float(budget),
                            one,
                            f"{entry.label}, {tokens_text(budget)} tokens: {self.accuracy} {estimate_text(one)}",
                        )
                        for budget, one in sorted(by_budget.items())
                    ],
                )
                for entry, by_budget in shown
            ]
            words = ("budget, tokens", f"{self.accuracy}, percent", f"{title}: accuracy by token budget")
            ticks = {budget: tokens_text(budget) for _, by_budget in shown for budget in by_budget}
            found.append(Figure(title, self._lines(lines, *words, ticks=ticks)))
        return found

    def lengths(self) -> list[Figure]:
        """Accuracy by how long samples are, and how many are so long."""
        found = []
        for task, title in self.tasks.items():
            shown = [(entry, entry.cells[task].by_length) for entry in spread(self.entries) if task in entry.cells]
            for name, y_label, value in (
                ("accuracy", "right samples, percent", _share_of_bin),
                ("share of samples", "samples, percent", _count_of_bin),
            ):
                lines = [
                    (
                        entry,
                        [
                            (
                                one.mean,
                                flat(value(one, bins)),
                                f"{entry.label}, {one.low:,.0f} to {one.high:,.0f} tokens: {one.count:,} samples, {one.share:.1f}% right",
                            )
                            for one in bins
                        ],
                    )
                    for entry, bins in shown
                ]
                words = ("tokens of a sample", y_label, f"{title}: {name} by length")
                found.append(Figure(f"{title}: {name}", self._lines(lines, *words)))
        return [figure for figure in found if figure.chart]

    def positions(self) -> list[Figure]:
        """Committed drafts by where in a sample they stand."""
        found = []
        for task, title in self.tasks.items():
            lines = [
                (
                    entry,
                    [
                        (
                            1 + one.mean,  # a logarithm starts at 1
                            flat(one.share),
                            f"{entry.label}, steps {one.low + 1:,.0f} to {one.high:,.0f}: {one.share:.1f}% of {one.count:,} drafts",
                        )
                        for one in entry.cells[task].by_position
                    ],
                )
                for entry in self.drafting()
                if task in entry.cells
            ]
            words = ("step of a sample", "committed drafts, percent", f"{title}: committed drafts by position")
            found.append(Figure(title, self._lines(lines, *words, ends=True)))
        return [figure for figure in found if figure.chart]

    def drafting(self) -> list[Entry]:
        """Entries with some drafts that are committed and some that are not."""
        return [
            entry
            for entry in self.entries
            if entry.condition.method == "speculative" or 0 < (entry.condition.threshold or 0.0) <= 1
            if any(cell.by_position for cell in entry.cells.values())
        ]

    def _lines(
        self,
        lines: Sequence[tuple[Entry, Sequence[tuple[float, Estimate, str]]]],
        x_label: str,
        y_label: str,
        title: str,
        ends: bool = False,
        ticks: Mapping[int, str] | None = None,
    ) -> Markup:
        """A line an entry. `ends` writes thresholds behind the lines; with `ticks`, the axis is logarithmic and has no others."""
        place, x_ticks = axis(x for _, points in lines for x, _, _ in points)
        if ticks is not None:
            place, x_ticks = _log2, {math.log2(value): text for value, text in ticks.items()}
        series = []
        for entry, points in lines:
            threshold = entry.condition.threshold
            drawn = [Point(place(x), one.value, *_ends(one), "", hint) for x, one, hint in points]
            end = f"{threshold:g}" if ends and threshold is not None else ""
            series.append(Series(entry.label, self.style(entry), drawn, True, SHAPES[entry.condition.method], end))
        return Markup(point_chart(series, x_label, y_label, title, x_ticks))


def reliability(cell: Cell, title: str) -> Figure:
    """Whether the gate's confidence means what it says."""
    calibration = cell.calibration
    assert calibration is not None
    chart = reliability_chart(calibration.bins, MEANINGS[calibration.kind], f"{title}: calibration")
    return Figure(f"{title}: calibration", Markup(chart), calibration_text(calibration))


def confidences(cell: Cell, title: str) -> Figure:
    """How the gate's confidence is spread."""
    calibration = cell.calibration
    assert calibration is not None
    total = sum(one.count for one in calibration.bins)
    bars = [_bar(one, total) for one in calibration.bins]
    words = ("confidence of the gate", "drafts, percent", f"{title}: how the confidence is spread")
    return Figure(f"{title}: spread", Markup(bar_chart([("s1", bars)], (0.0, 1.0), *words)))


def _bar(one: Bin, total: int) -> Bar:
    height = 100 * one.count / total
    return Bar(
        one.low, one.high, height, f"confidence {one.low:.1f} to {one.high:.1f}: {one.count:,} drafts, {height:.1f}%"
    )


def calibration_text(calibration: Calibration) -> str:
    """Its figures in a line."""
    return (
        f"{calibration.num_drafts:,} drafts; ECE {number(calibration.expected_error, '.3f')}, "
        f"AUC {number(calibration.area_under_curve, '.3f')}"
    )


def axis(values: Iterable[float]) -> tuple[Callable[[float], float], dict[float, str] | None]:
    """How values are placed along an axis, and its ticks where they are not plain numbers: logarithmic where they reach far."""
    finite = [value for value in values if math.isfinite(value) and value > 0]
    if not finite or max(finite) < LOG_FROM * min(finite):
        return float, None
    low, high = math.floor(math.log2(min(finite))), math.ceil(math.log2(max(finite)))
    step = math.ceil((high - low) / 8)
    return _log2, {float(power): tokens_text(2**power) for power in range(low, high + 1, step)}


def _log2(value: float) -> float:
    return math.log2(value) if value > 0 else math.nan


def tokens_text(count: float) -> str:
    """A number of tokens, short: 2K for 2,048."""
    return f"{count / 1024:g}K" if count >= 1024 and count % 512 == 0 else f"{count:g}"


def estimate_text(one: Estimate) -> str:
    """An estimate with its interval, in words."""
    if math.isnan(one.value):
        return "unknown"
    return f"{one.value:.1f}%" + ("" if math.isnan(one.low) else f" [{one.low:.1f}, {one.high:.1f}]")


def number(value: float, form: str) -> str:
    """A figure, or a dash where it is not defined."""
    return "–" if math.isnan(value) else format(value, form)


def flat(value: float) -> Estimate:
    """A figure without an interval."""
    return Estimate(value, 0.0, value, value, 0)


def _ends(one: Estimate) -> tuple[float, float]:
    return (one.value, one.value) if math.isnan(one.low) else (one.low, one.high)


def _share_of_bin(one: Bin, bins: Sequence[Bin]) -> float:
    return one.share


def _count_of_bin(one: Bin, bins: Sequence[Bin]) -> float:
    return 100 * one.count / sum(other.count for other in bins)
