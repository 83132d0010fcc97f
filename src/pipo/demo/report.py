"""The demo's `report.html`: one self-contained page, no network, light and dark."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from markupsafe import Markup

from pipo.demo.controls import Controls
from pipo.demo.eval_task import TEMPERATURE, TOP_P
from pipo.demo.evaluate import (
    MAX_NUM_SEQS,
    SAMPLES,
    Result,
    is_right_sample,
    shown_pairs,
    threshold_text,
)
from pipo.demo.world import Problem, solve
from pipo.pages.charts import Bar, Point, Series, bar_chart, point_chart, reliability_chart
from pipo.pages.template import render_page
from pipo.reliability import area_under_curve, expected_error, share_bins, tenths

STYLES = {"regular": "s2", "mtp": "s3", "speculative": "s4", "pipo": "s1", "papers-gate": "s6", "teacher": "s5"}
CURVES = {"pipo": "PIPO, by threshold", "papers-gate": "with the paper’s gate"}
"""Methods with a point for each threshold."""
SHOWN_SAMPLES = 6
SHOWN_THRESHOLD = 0.95


@dataclass(frozen=True, slots=True)
class Setting:
    """What the figures were measured with, for the footer."""

    seed: int
    num_speed_problems: int
    processor: str
    num_threads: int
    versions: str
    seconds: float


def build_report(
    results: Sequence[Result], problems: Sequence[Problem], pieces: dict[int, str], controls: Controls, setting: Setting
) -> str:
    """The whole page as HTML."""
    source = resources.files("pipo.demo").joinpath("report.html.j2").read_text(encoding="utf-8")
    regular_tpot_s = regular(results).tpot_s
    pipo = [result for result in results if result.method.name == "pipo"]
    drafts = drafts_of(pipo)
    bins = share_bins(*drafts, tenths())
    chosen = nearest(pipo, SHOWN_THRESHOLD)
    histogram = [
        (f"τ = {threshold_text(r.method.threshold or 0.0)}", f"s{i + 1}", r.tokens_per_step_of_samples)
        for i, r in enumerate(spread(pipo))
    ]
    return render_page(
        source,
        num_problems=len(problems),
        cards=cards(results),
        example_problem=problems[0].text,
        example_solution="".join(solve(problems[0], random.Random(setting.seed))),
        rows=[_row(result, regular_tpot_s) for result in results],
        table_note=TABLE_NOTE if controls.rows else THRESHOLD_NOTE,
        controls=[_control_row(row) for row in controls.rows],
        controls_note=controls.note,
        speed_chart=_accuracy_chart(_series(results, lambda r: regular_tpot_s / r.tpot_s), "speed-up over regular"),
        step_chart=_accuracy_chart(_series(results, lambda r: r.tokens_per_step), "tokens per step"),
        chart_key=[
            (CURVES.get(name, label), STYLES[name])
            for name, label in {result.method.name: result.method.label for result in results}.items()
        ],
        calibration_chart=Markup(reliability_chart(bins, "are right", "Calibration of the confidence head")),
        calibration_note=_calibration_note(drafts, drafts_of([r for r in results if r.method.name == "papers-gate"])),
        histogram=_histogram(histogram),
        histogram_key=[(name, style) for name, style, _ in histogram],
        samples=_samples(chosen, problems, pieces),
        how_measured=(
            f"Measured with seed {setting.seed} on {setting.processor}, {setting.num_threads} thread(s), {setting.versions}, in "
            f"{setting.seconds:.0f} s. Accuracy: {SAMPLES} samples a problem at temperature {TEMPERATURE:g}, top-p {TOP_P:g}, up to "
            f"{MAX_NUM_SEQS} at a time. TTFT and TPOT: medians over {setting.num_speed_problems} problems, one request at a time, methods "
            "taking turns. TPOT is the time per visible token after the first step."
        ),
        how_trained=controls.how_trained,
    )


THRESHOLD_NOTE = "95% intervals, samples clustered by problem. PIPO τ: drafts with at least this confidence are kept."
TABLE_NOTE = (
    f"{THRESHOLD_NOTE} "
    "“regular” was trained for as many steps as PIPO, from the same start; the teacher for longer, and on fresh problems."
)


def regular(results: Sequence[Result]) -> Result:
    """The row that the others are compared with."""
    return next(result for result in results if result.method.name == "regular")


def nearest(results: Sequence[Result], threshold: float) -> Result:
    """The result whose threshold is nearest."""
    return min(results, key=lambda result: abs((result.method.threshold or 0.0) - threshold))


def spread(results: Sequence[Result]) -> list[Result]:
    """Three results of increasing threshold, from the first on: always, middling, strict."""
    wanted = [nearest(results, threshold) for threshold in (0.0, 0.7, 0.9)]
    return [result for index, result in enumerate(wanted) if result not in wanted[:index]]


Drafts = tuple[list[float], list[bool], list[bool]]


def drafts_of(results: Sequence[Result]) -> Drafts:
    """Of every draft that was judged: its confidence, whether it is right, whether it is wrong."""
    drafts = [draft for result in results for draft in result.drafts]
    return [one.confidence for one in drafts], [one.right for one in drafts], [not one.right for one in drafts]


def cards(results: Sequence[Result]) -> list[dict[str, str]]:
    """The headline figures: PIPO at the threshold that the page's solutions are shown for, beside regular decoding."""
    base = regular(results)
    shown = nearest([result for result in results if result.method.name == "pipo"], SHOWN_THRESHOLD)
    at = f"τ = {threshold_text(shown.method.threshold or 0.0)}"
    return [
        {"value": f"{shown.avg_at_4:.1f}%", "text": f"PIPO’s avg@4 at {at}; regular decoding: {base.avg_at_4:.1f}%"},
        {
            "value": f"{shown.tokens_per_step:.2f}",
            "text": f"tokens per step there; {100 * shown.commit_rate:.0f}% of the drafts kept",
        },
        {
            "value": f"{base.tpot_s / shown.tpot_s:.2f}×",
            "text": "speed-up of each token after the first step, one request at a time",
        },
        {"value": f"{shown.pass_at_4:.1f}%", "text": f"PIPO’s pass@4 there; regular decoding: {base.pass_at_4:.1f}%"},
    ]


def _accuracy_chart(series: Sequence[Series], x_label: str) -> Markup:
    return Markup(point_chart(series, x_label, "avg@4, percent", "Accuracy against speed"))


def _histogram(groups: Sequence[tuple[str, str, Sequence[float]]]) -> Markup:
    """Tokens per step of single samples: the bars of each (name, style, values) over one another."""
    low, high, num_bins = 1.0, 2.0, 20
    width = (high - low) / num_bins
    bars = []
    for name, style, values in groups:
        counts = [0] * num_bins
        for value in values:
            counts[min(num_bins - 1, max(0, int((value - low) / (high - low) * num_bins)))] += 1
        shares = [100 * count / max(len(values), 1) for count in counts]
        edges = [low + index * width for index in range(num_bins)]
        bars.append(
            (style, [Bar(x, x + width, share, f"{name}: {share:.1f}%") for x, share in zip(edges, shares, strict=True)])
        )
    return Markup(bar_chart(bars, (low, high), "tokens per step of a sample", "samples, percent", "Tokens per step"))


def _row(result: Result, regular_tpot_s: float) -> dict[str, str]:
    return {
        "kind": result.method.name,
        "label": result.method.label,
        "avg": f"{result.avg_at_4:.1f}",
        "avg_interval": interval_text(result.avg_at_4_interval),
        "pass_": f"{result.pass_at_4:.1f}",
        "pass_interval": interval_text(result.pass_at_4_interval),
        "tokens_per_step": f"{result.tokens_per_step:.2f}",
        "commit_rate": f"{result.commit_rate:.2f}",
        "ttft": f"{1000 * result.ttft_s:.1f}",
        "tpot": f"{1000 * result.tpot_s:.2f}",
        "speed_up": f"{regular_tpot_s / result.tpot_s:.2f}×",
    }


def _control_row(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "pipo" if row["method"] == "pipo" else "",
        "model": row["model"],
        "label": row["label"],
        "avg": f"{row['avg_at_4']:.1f}",
        "avg_interval": interval_text(row["avg_at_4_interval"]),
        "pass_": f"{row['pass_at_4']:.1f}",
        "pass_interval": interval_text(row["pass_at_4_interval"]),
        "tokens_per_step": f"{row['tokens_per_step']:.2f}",
        "steps": f"{row['total_steps']:,}",
        "seconds": f"{row['total_seconds']:.0f}",
    }


def interval_text(interval: Sequence[float]) -> str:
    """An interval as the tables write it; empty where it is undefined."""
    low, high = interval
    return "" if math.isnan(low) else f"{low:.0f}–{high:.0f}"


def _series(results: Sequence[Result], x: Any) -> list[Series]:
    found = []
    for name, style in STYLES.items():
        rows = [result for result in results if result.method.name == name]
        points = [
            Point(
                x(row),
                row.avg_at_4,
                *_ends(row),
                label=threshold_text(row.method.threshold) if row.method.threshold is not None else "",
                hint=_hint(row),
            )
            for row in rows
        ]
        found.append(Series(name, style, points, line=len(points) > 1))
    return found


def _hint(row: Result) -> str:
    return f"{row.method.label}: avg@4 {row.avg_at_4:.1f}%, {row.tokens_per_step:.2f} tokens a step, TPOT {1000 * row.tpot_s:.2f} ms"


def _ends(row: Result) -> tuple[float, float]:
    low, high = row.avg_at_4_interval
    return (row.avg_at_4, row.avg_at_4) if math.isnan(low) else (low, high)


def _calibration_note(drafts: Drafts, papers: Drafts) -> str:
    _, right, _ = drafts
    note = (
        f"{len(right):,} drafts after a right text; {100 * sum(right) / max(len(right), 1):.1f}% are right themselves by the rules of the "
        f"game. {_quality(drafts)}."
    )
    if papers[0]:
        note += (
            f" The paper’s gate, which sees no draft: {_quality(papers)}; it learned how far student and teacher agree, so it doubts "
            "free choices that are right all the same."
        )
    return note


def _quality(drafts: Drafts) -> str:
    error = expected_error(share_bins(*drafts, tenths()))
    return f"AUC {area_under_curve(*drafts):.3f}, mean gap to the diagonal {error:.3f}"


def _samples(result: Result, problems: Sequence[Problem], pieces: dict[int, str]) -> list[dict[str, Any]]:
    """Samples of different problems, those first in which the gate had something to decide."""
    firsts = list(range(0, len(result.samples), SAMPLES))
    firsts.sort(key=lambda index: result.samples[index].num_rejected == 0)
    shown = []
    for index in firsts[:SHOWN_SAMPLES]:
        output, problem = result.samples[index], problems[index // SAMPLES]
        pairs = [
            {
                "token1": token1,
                "draft": draft,
                "style": "kept" if pair.committed else "no",
                "confidence": "–" if pair.confidence is None else f"{pair.confidence:.3f}",
            }
            for token1, draft, pair in shown_pairs(output, pieces)
        ]
        shown.append(
            {
                "problem": problem.text,
                "right": is_right_sample(problem, output),
                "threshold": threshold_text(result.method.threshold or 0.0),
                "num_tokens": len(output.token_ids),
                "num_pairs": output.num_pairs,
                "pairs": pairs,
            }
        )
    return shown
