"""The report of one or several runs: one page that stands alone, without network, in light and dark. No torch."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipo.data.writing import write_text
from pipo.evaluation.report.entries import Entry, entries_of, spread, titles_of
from pipo.evaluation.report.figures import Figure, Figures, confidences, reliability
from pipo.evaluation.report.provenance import benchmarks_table, facts, hardware_of, notes_of
from pipo.evaluation.report.runs import Run, read_runs
from pipo.evaluation.report.tables import Tables
from pipo.evaluation.report.transcripts import transcripts
from pipo.pages.template import read_asset, render_page

PACKAGE = "pipo.evaluation.report"
NUM_LANES = 3
"""Transcripts of a question that stand side by side at first."""
JUDGED = {
    "right": "A draft is right by the rules of the task.",
    "agreed": "A rejected draft came true where the model then wrote the same token itself. Committed drafts can’t be judged so, and a "
    "low threshold therefore shows low confidences only: each chart is of the threshold with the most judged drafts.",
}


def write_report(folders: Iterable[str | Path], path: str | Path) -> None:
    """Write the report of the runs in `folders` to `path`, whole or not at all.

    Raises:
        DataError: a folder holds no run, can't be read, or two runs asked different questions. OSError: the page can't be written.
    """
    page = build_page(read_runs(folders))
    write_text(path, page)


def build_page(runs: Sequence[Run]) -> str:
    """The whole page as HTML, for at least one run."""
    found = entries_of(runs)
    tasks = titles_of(runs)
    tables = Tables(found, tasks)
    figures = Figures(found, tasks, tables.accuracy)
    script = read_asset(PACKAGE, "page.js")
    content: dict[str, Any] = {
        "title": _title(found),
        "lead": _lead(runs, found, tasks),
        "notes": notes_of(runs, found, tasks),
        "script": Markup(script),
        "script_hash": f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        "page_style": Markup(read_asset(PACKAGE, "page.css")),
        "num_tasks": len(tasks),
        "accuracy": tables.accuracy,
        "measures": _measures(tables),
        "main": tables.main(),
        "compared": tables.compared(),
        "reference": tables.reference_words,
        "cells": tables.cells(),
        **_figures(figures, tables),
        **_calibration(found, tasks, tables),
        **_transcripts(runs, found, tasks, tables),
        "benchmarks": benchmarks_table(runs, tasks),
        "made": facts(runs),
    }
    content["contents"] = [(name, text) for name, text, shown in SECTIONS if shown is None or content[shown]]
    return render_page(read_asset(PACKAGE, "page.html.j2"), **content)


SECTIONS = (
    ("results", "Results", None),
    ("compared", "Compared", "compared"),
    ("trade", "Accuracy and speed", None),
    ("budgets", "Token budgets", "budgets"),
    ("calibration", "Calibration", "calibration_table"),
    ("lengths", "Length", "lengths"),
    ("positions", "Position", "positions"),
    ("transcripts", "Side by side", "asked"),
    ("figures", "Every figure", None),
    ("made", "How this was made", None),
)


def _title(found: Sequence[Entry]) -> str:
    models = list(dict.fromkeys(entry.model for entry in found))
    more = f" and {len(models) - 3} more" if len(models) > 3 else ""
    return f"Evaluation of {', '.join(models[:3])}{more}"


def _lead(runs: Sequence[Run], found: Sequence[Entry], tasks: dict[str, str]) -> str:
    questions = {task: max(entry.cells[task].num_questions for entry in found if task in entry.cells) for task in tasks}
    samples = {cell.num_samples for entry in found for cell in entry.cells.values()}
    words = [
        f"{', '.join(tasks.values())}: {sum(questions.values()):,} questions",
        f"{' or '.join(map(str, sorted(samples)))} {'sample' if samples == {1} else 'samples'} of each",
        f"{len(found)} {'way' if len(found) == 1 else 'ways'} of decoding",
    ]
    dates = sorted({str(date)[:10] for run in runs if (date := (run.record.model_extra or {}).get("date"))})
    when = [" to ".join(dict.fromkeys((dates[0], dates[-1])))] if dates else []
    return " · ".join([*words, *hardware_of(runs), *when])


def _measures(tables: Tables) -> str:
    several = " All tasks: the unweighted mean of the tasks." if len(tables.tasks) > 1 else ""
    return (
        f"{tables.accuracy}: share of right samples. pass@{tables.num_draws}: questions of which at least one of {tables.num_draws} "
        f"samples is right. Small: 95% intervals, samples clustered by question. Unfinished and failed samples are wrong.{several} "
        "Speeds are means over the tasks; tokens are those that a reader sees. Press a heading to sort."
    )


def _figures(figures: Figures, tables: Tables) -> dict[str, Any]:
    shown = spread(figures.entries)
    thresholds = sorted({f"{entry.condition.threshold:g}" for entry in shown if entry.condition.threshold is not None})
    many = len(shown) < len(figures.entries)
    return {
        "trade_by_step": figures.trade(lambda cell: cell.tokens_per_step, "tokens per step"),
        "trade_by_time": figures.trade(lambda cell: cell.tokens_per_s, "tokens per second"),
        "trade_key": figures.key(figures.entries, by_threshold=True),
        "budgets": figures.budgets(),
        "budgets_table": tables.budgets(),
        "lengths": figures.lengths(),
        "positions": figures.positions(),
        "position_key": figures.key(figures.drafting(), by_threshold=True),
        "shown_key": figures.key(shown),
        "shown_words": f" PIPO is shown at τ = {' and '.join(thresholds)}." if many and thresholds else "",
    }


def _calibration(found: Sequence[Entry], tasks: dict[str, str], tables: Tables) -> dict[str, Any]:
    """Reliability and spread of the confidence: of each model and task where most drafts were judged, then of all others."""
    charts: list[Figure] = []
    more: list[Figure] = []
    kinds: dict[str, None] = {}
    for task, title in tasks.items():
        for model in dict.fromkeys(entry.model for entry in found):
            some = [e for e in found if e.model == model and task in e.cells and e.cells[task].calibration]
            some.sort(key=lambda entry: -_num_judged(entry, task))
            for place, entry in enumerate(some):
                cell, name = entry.cells[task], f"{title}: {entry.label}"
                (more if place else charts).extend([reliability(cell, name), confidences(cell, name)])
                kinds[cell.calibration.kind if cell.calibration else ""] = None
    return {
        "calibrations": charts,
        "more_calibrations": more,
        "calibration_table": tables.calibrations(),
        "calibration_words": " ".join(JUDGED[kind] for kind in kinds),
    }


def _num_judged(entry: Entry, task: str) -> int:
    calibration = entry.cells[task].calibration
    return calibration.num_drafts if calibration else 0


def _transcripts(runs: Sequence[Run], found: list[Entry], tasks: dict[str, str], tables: Tables) -> dict[str, Any]:
    asked = transcripts(runs, found, tasks)
    keys = sorted({one.key for some in asked for one in some.transcripts})
    references = {found.index(one) for one in tables.references if one is not None}
    wanted = [
        *sorted(references),
        *(found.index(entry) for entry in spread(found) if entry.condition.method == "pipo"),
        *keys,
    ]
    on = set([key for key in dict.fromkeys(wanted) if key in keys][:NUM_LANES])
    return {"asked": asked, "chips": [(found[key].label, key, key in on) for key in keys]}
