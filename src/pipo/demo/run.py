"""`pipo demo`: fresh problems, every method, a table, one solution in colour and a report, in about a minute."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import pipo
from pipo.demo.controls import Controls, read_controls
from pipo.demo.evaluate import (
    METHODS,
    SAMPLES,
    Checkpoints,
    Result,
    is_right_sample,
    measure_speed,
    shown_pairs,
    solve_all,
)
from pipo.demo.report import (
    SHOWN_THRESHOLD,
    TABLE_NOTE,
    THRESHOLD_NOTE,
    Setting,
    build_report,
    interval_text,
    nearest,
    regular,
)
from pipo.demo.tokenizer import piece_ids
from pipo.demo.world import Problem, draw_problems
from pipo.errors import CheckpointError, ConfigError
from pipo.run_record import processor_name

CHECKPOINTS = Path(__file__).parent / "checkpoints"
NAMES = ("pipo", "papers-gate", "regular", "teacher")
NUM_SPEED_PROBLEMS = 12


def main(
    out: Path,
    seed: int,
    num_problems: int,
    as_json: bool,
    console: Console,
    checkpoints: Path = CHECKPOINTS,
    pipo_model: Path | None = None,
) -> None:
    """Runs the demo and writes `results.json` and `report.html` into `out`.

    Args:
        seed: draws the problems and the samples. num_problems: at least 1. as_json: print the rows as JSON on standard output
            instead of table and text on `console`. checkpoints: a folder with `pipo`, `papers-gate`, `regular` and `teacher`.
        pipo_model: a checkpoint to stand in place of `pipo`; then there is no other gate to compare with.

    Raises:
        ConfigError, CheckpointError
    """
    began = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small to share: a second thread costs more than it brings
    try:
        _run(out, seed, num_problems, as_json, console, checkpoints, pipo_model, began)
    finally:
        torch.set_num_threads(threads)


def _run(
    out: Path,
    seed: int,
    num_problems: int,
    as_json: bool,
    console: Console,
    checkpoints: Path,
    pipo_model: Path | None,
    began: float,
) -> None:
    if num_problems < 1:
        raise ConfigError(f"num_problems must be at least 1, got {num_problems}")
    folders = {name: checkpoints / name for name in NAMES}
    if pipo_model is not None:
        folders["pipo"] = pipo_model
        del folders["papers-gate"]
    for folder in folders.values():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} holds no checkpoint; `pipo demo --train` makes one")
    if pipo_model is None:
        controls = read_controls(checkpoints / "controls.json")
    else:
        controls = Controls([], "", f"PIPO: {pipo_model}. Regular model and teacher: those of {checkpoints}.")
    problems = draw_problems(seed, num_problems, "test")
    if not as_json:
        _introduce(problems[0], num_problems, console)
    models = Checkpoints(folders)
    results = _measure(models, problems, seed, console)
    pieces = {index: piece for piece, index in piece_ids(models.tokenizer).items()}
    rows = [result.row(regular(results).tpot_s) for result in results]
    setting = Setting(
        seed=seed,
        num_speed_problems=min(NUM_SPEED_PROBLEMS, num_problems),
        processor=processor_name(),
        num_threads=torch.get_num_threads(),
        versions=f"pipo {pipo.__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
        seconds=time.perf_counter() - began,
    )
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "results.json", _as_json(rows, indent=1) + "\n")
    _write(out / "report.html", build_report(results, problems, pieces, controls, setting))
    if as_json:
        print(_as_json(rows))
        return
    console.print(results_table(results))
    console.print(Text(TABLE_NOTE if controls.rows else f"{THRESHOLD_NOTE} {controls.how_trained}", style="dim"))
    if controls.rows:
        console.print()
        console.print(controls_table(controls.rows))
        console.print(Text(controls.note, style="dim"))
    _show_solution(results, problems, pieces, console)
    console.print(
        f"\nreport: [bold]{out / 'report.html'}[/bold]   rows: {out / 'results.json'}   ({setting.seconds:.0f} s)"
    )


def _introduce(problem: Problem, num_problems: int, console: Console) -> None:
    console.print("[bold]PIPO writes two tokens a step; its gate decides whether the second one stays.[/bold]")
    console.print(
        f"{num_problems} problems no model has seen: a board game on a ring of 100 squares. Play every card once, in any order,\n"
        f"and say after each where the piece stands. For example: [cyan]{problem.text}[/cyan]\n"
    )


def _measure(models: Checkpoints, problems: Sequence[Problem], seed: int, console: Console) -> list[Result]:
    speed_problems = problems[:NUM_SPEED_PROBLEMS]
    with Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as progress:
        methods = [method for method in METHODS if method.checkpoint in models.names]
        task = progress.add_task("", total=len(methods) + len(speed_problems) + 1)
        results = []
        for method in methods:
            progress.update(task, description=f"solving: {method.label}")
            results.append(solve_all(models, method, problems, seed))
            progress.advance(task)
        progress.update(task, description="timing one request at a time")
        measure_speed(models, results, speed_problems, seed, lambda: progress.advance(task))
    return results


def results_table(results: Sequence[Result]) -> Table:
    """The table of the methods measured now."""
    table = Table(
        title="Measured now", title_justify="left", header_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("method", no_wrap=True)
    for name in ("avg@4 %", "pass@4 %", "tok/step", "commit", "TTFT ms", "TPOT ms", "speed"):
        table.add_column(name, justify="right", no_wrap=True)
    base = regular(results)
    for result in results:
        table.add_row(
            result.method.label,
            _with_interval(result.avg_at_4, result.avg_at_4_interval),
            _with_interval(result.pass_at_4, result.pass_at_4_interval),
            f"{result.tokens_per_step:.2f}",
            f"{result.commit_rate:.2f}",
            f"{1000 * result.ttft_s:.1f}",
            f"{1000 * result.tpot_s:.2f}",
            f"{base.tpot_s / result.tpot_s:.2f}×",
            style="cyan" if result.method.name == "pipo" else "dim" if result.method.name == "papers-gate" else "",
        )
    return table


def controls_table(rows: Sequence[dict[str, object]]) -> Table:
    """The table of the equal-budget controls."""
    table = Table(
        title="Measured when these checkpoints were trained",
        title_justify="left",
        header_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in ("model", "decoding"):
        table.add_column(name, no_wrap=True)
    for name in ("avg@4 %", "pass@4 %", "tok/step", "steps", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["model"]),
            str(row["label"]),
            _with_interval(row["avg_at_4"], row["avg_at_4_interval"]),  # type: ignore[arg-type]
            _with_interval(row["pass_at_4"], row["pass_at_4_interval"]),  # type: ignore[arg-type]
            f"{row['tokens_per_step']:.2f}",
            str(row["total_steps"]),
            f"{row['total_seconds']:.0f}",
            style="cyan" if row["method"] == "pipo" else "",
        )
    return table


def _with_interval(value: float, interval: Sequence[float]) -> Text:
    return Text.assemble(f"{value:.1f} ", (f"{interval_text(interval):>6}", "dim"))


def _show_solution(
    results: Sequence[Result], problems: Sequence[Problem], pieces: dict[int, str], console: Console
) -> None:
    """One solution with its second tokens in colour: a right one in which the gate kept and rejected, where there is one."""
    result = nearest([result for result in results if result.method.name == "pipo"], SHOWN_THRESHOLD)

    def interest(index: int) -> tuple[bool, bool]:
        output = result.samples[index]
        return (
            is_right_sample(problems[index // SAMPLES], output),
            output.num_committed > 0 and output.num_rejected > 0,
        )

    index = max(range(len(result.samples)), key=interest)
    output, text = result.samples[index], Text()
    for token1, draft, pair in shown_pairs(output, pieces):
        text.append(token1)
        if draft:
            text.append(
                draft if pair.committed else f"({draft})", style="bold green" if pair.committed else "red strike"
            )
        text.append(" |", style="dim")
    console.print(
        f"\n[bold]One solution, pair by pair[/bold] ({result.method.label}; second tokens [bold green]kept[/], [red strike](rejected)[/])"
    )
    console.print(Text(problems[index // SAMPLES].text, style="cyan"))
    console.print(text)
    console.print(f"[dim]{len(output.token_ids)} tokens in {output.num_pairs} steps[/dim]")


def _as_json(rows: Sequence[dict[str, Any]], indent: int | None = None) -> str:
    """JSON knows no NaN: an end of an interval that is undefined (one problem has no spread) is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    plain_rows = [{name: plain(value) for name, value in row.items()} for row in rows]
    return json.dumps(plain_rows, indent=indent, ensure_ascii=False, allow_nan=False)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
