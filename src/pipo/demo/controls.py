"""The equal-budget controls: every stage's model on the same problems, measured when the demo was trained.

They ship as `controls.json` beside the checkpoints, because the models themselves do not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipo.demo.evaluate import Checkpoints, Method, pipo_methods, solve_all, threshold_text
from pipo.demo.recipe import Recipe, stage_folder, stage_model
from pipo.demo.world import draw_problems
from pipo.errors import CheckpointError
from pipo.run_record import processor_name

NUM_PROBLEMS = 150
PROBLEM_SEED = 77_000
THRESHOLDS = (0.0, 0.5, 0.9, 0.95, 1.01)

MODELS = {
    "base": "start of all",
    "regular": "regular control",
    "sft": "PIPO SFT",
    "sft-long": "PIPO SFT control",
    "opd": "PIPO SFT + OPD",
    "gate": "PIPO SFT + OPD, gate fitted",
    "teacher": "teacher",
}


@dataclass(frozen=True, slots=True)
class Controls:
    """Rows as `evaluate.Result.row` gives them, with `model`, `total_steps` and `total_seconds` of its training."""

    rows: list[dict[str, Any]]
    note: str
    how_trained: str


def measure_controls(recipe: Recipe, out: Path, path: Path, advance: Callable[[str], None], num_problems: int) -> None:
    """Measures every stage of a finished training and writes `path`."""
    problems = draw_problems(PROBLEM_SEED, num_problems, "test")
    checkpoints = Checkpoints({stage.name: stage_model(out, stage.name) for stage in recipe.stages})
    rows = []
    for name, model in MODELS.items():
        records = lineage(recipe, out, name)
        for method in _methods(recipe, name):
            advance(f"{model}: {method.label}")
            row = solve_all(checkpoints, method, problems, PROBLEM_SEED).row(regular_tpot_s=float("nan"))
            for unmeasured in ("ttft_s", "tpot_s", "speed_up"):
                del row[unmeasured]
            row["model"] = model
            row["total_steps"] = sum(record["stage"]["steps"] for record in records)
            row["total_seconds"] = round(sum(record["seconds"] for record in records), 1)
            rows.append(row)
    record = lineage(recipe, out, "opd")[-1]
    content = {
        "rows": rows,
        "recipe": record["recipe"],
        "git_revision": record["git_revision"],
        "versions": record["versions"],
        "hardware": record["hardware"],
        "processor": processor_name(),
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _methods(recipe: Recipe, name: str) -> list[Method]:
    if recipe.stage(name).kind != "regular":
        return [
            Method("pipo", f"τ = {threshold_text(m.threshold or 0.0)}", name, "pipo", m.threshold)
            for m in pipo_methods(name, THRESHOLDS)
        ]
    return [Method("regular", "regular", name, "regular"), Method("mtp", "MTP, unverified", name, "mtp")]


def lineage(recipe: Recipe, out: Path, name: str) -> list[dict[str, Any]]:
    """The run records of a stage and of all it starts from, first one first."""
    start = recipe.stage(name).start
    record: dict[str, Any] = json.loads((stage_folder(out, name) / "run.json").read_text())
    return [*(lineage(recipe, out, start) if start else []), record]


def read_controls(path: Path) -> Controls:
    """Reads what `measure_controls` wrote.

    Raises:
        CheckpointError: the file is missing or is not what `pipo demo --train` writes.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        recipe, versions = content["recipe"], content["versions"]
        rows: Sequence[dict[str, Any]] = content["rows"]
        return Controls(
            rows=list(rows),
            note=(
                f"Measured when the checkpoints were trained (not now), on {rows[0]['num_problems']} problems of their own, on "
                f"{content['processor']}. Steps and seconds (by the clock, beside whatever else that machine did) count "
                "everything from nothing. The controls have as many steps as SFT + OPD; they and SFT use the same "
                f"{recipe['num_fixed_solutions']:,} worked solutions; the start and the teacher see a fresh problem each time; "
                "OPD sees fresh problems but no solutions, only what the teacher says of its own; the steps that fit a gate move the "
                "confidence head alone."
            ),
            how_trained=(
                f"Trained by `pipo demo --train`, seed {recipe['seed']}: Qwen3 of width {recipe['hidden_size']}, "
                f"{recipe['num_layers']} layers, batch {recipe['batch_size']}, float32, one thread a stage, pipo "
                f"{versions['pipo']}, torch {versions['torch']}, revision {content['git_revision'] or 'unknown'}."
            ),
        )
    except (OSError, KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{path} is not a record that `pipo demo --train` wrote: {error!r}") from error
