"""`pipo tune-threshold`: the threshold of a gate that reaches a target, with the curve it was chosen from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipo.cli.eval_run import TASK_NAMES, home_of_runs, parse_source
from pipo.cli.options import (
    AUTO,
    Checkpoint,
    SandboxKind,
    UnsafeLocalExec,
    engine_arguments,
    takes_engine_without_method,
    takes_task_sampling,
)
from pipo.cli.terminal import console, print_json, working
from pipo.cli.threshold_curve import CURVE, Curve, measure_on_prompts, measure_on_tasks, read_prompts
from pipo.cli.threshold_table import curve_table, describe_choice, describe_failure
from pipo.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from pipo.evaluation.subject import EngineSubject
    from pipo.evaluation.tuning import Point, Target

THRESHOLDS = "0,.3,.5,.7,.8,.9,.95,.98"


@takes_engine_without_method
@takes_task_sampling
def tune_threshold(
    path: Checkpoint,
    engine: dict[str, Any],
    sampling: dict[str, Any],
    target: Annotated[
        str,
        typer.Option(
            help="accuracy-drop=X: at most X points of avg@k lost. tokens-per-step=X or commit-rate=X: at least X.",
            metavar="MEASURE=X",
        ),
    ],
    tasks: Annotated[
        str | None, typer.Option("--tasks", "-t", help=f"Measure on these: {TASK_NAMES}.", metavar="A,B")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Measure on prompts of your own, as rows of messages or prompt. No accuracy.", metavar="FILE"
        ),
    ] = None,
    thresholds: Annotated[
        str | None,
        typer.Option(
            help="With --tasks: what is tried, beside never committing. With --prompts they are searched for.",
            show_default=THRESHOLDS,
            metavar="A,B,…",
        ),
    ] = None,
    confident: Annotated[
        bool, typer.Option("--confident", help="Of accuracy-drop: the interval's low end must stay within it, too.")
    ] = False,
    samples: Annotated[int, typer.Option("--samples", "-k", help="Samples of each question or prompt.", min=1)] = 4,
    limit: Annotated[
        int | None, typer.Option(help="Only so many questions of each task, from the first.", show_default="all")
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(help="Only so many prompts, from the first.", min=1, show_default="all")
    ] = None,
    source: Annotated[
        list[str],
        typer.Option(
            help="Questions of a task: a file, a folder or a hub id. May be repeated.",
            show_default="the task's own on the hub",
            metavar="TASK=PATH",
        ),
    ] = [],  # noqa: B006 (typer reads the default and never changes it)
    seed: Annotated[int, typer.Option(help="The same seed gives the same samples.", min=0)] = 0,
    save: Annotated[
        bool, typer.Option("--save", help="Write the threshold into the checkpoint: for requests that name none.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of runs.", show_default="tune in the checkpoint's folder, else tune/NAME here", metavar="DIR"
        ),
    ] = None,
    sandbox: SandboxKind = AUTO,
    unsafe_local_exec: UnsafeLocalExec = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print curve and choice as JSON.")] = False,
) -> None:
    """Choose the gate's threshold by a target, and show the curve it was chosen from.

    On tasks, each threshold is evaluated as by pipo eval and compared with never committing, question by question. On prompts, the
    highest threshold that is fast enough is searched for. The same command goes on where it was stopped; a finished one is only read.
    """
    from pipo.evaluation.tuning import choose, parse_target

    wanted = parse_target(target)
    _check_given(wanted, tasks, prompts, confident, thresholds, num_prompts, limit, source)
    subject = _open_subject(path, engine, save)
    home = out or home_of_runs("tune", path, local=True)
    if tasks is not None:
        settings: dict[str, Any] = {"limit": limit, "seed": seed, "sampling": sampling, "num_samples": samples}
        settings |= {"tasks": _parse_names(tasks), "sources": dict(parse_source(text) for text in source)}
        curve = measure_on_tasks(
            subject,
            _parse_thresholds(thresholds or THRESHOLDS),
            settings,
            home,
            {"sandbox": sandbox, "unsafe_local": unsafe_local_exec},
        )
    else:
        assert prompts is not None
        rows = read_prompts(prompts, num_prompts)
        curve = measure_on_prompts(subject, prompts, rows, {**sampling, "n": samples, "seed": seed}, wanted, home)
    chosen = choose(curve.points, wanted, confident=confident)
    found = _write(curve, path, wanted, confident, chosen)
    saved = _save(subject, chosen) if save and chosen is not None else None
    if as_json:
        print_json({**found, "folder": curve.folder, "saved": saved})
    else:
        _show(curve, path, wanted, chosen, saved)
    if chosen is None:
        raise ConfigError(describe_failure(curve.points, wanted, confident))


def _check_given(
    target: Target,
    tasks: str | None,
    prompts: str | None,
    confident: bool,
    thresholds: str | None,
    num_prompts: int | None,
    limit: int | None,
    source: list[str],
) -> None:
    """Refuse options that contradict each other."""
    if (tasks is None) == (prompts is None):
        raise ConfigError("name what to measure on: either --tasks, or --prompts")
    if target.measure == "accuracy-drop" and prompts is not None:
        raise ConfigError("accuracy-drop needs questions that can be graded: give --tasks instead of --prompts")
    if target.measure != "accuracy-drop" and confident:
        raise ConfigError(f"--confident is of accuracy-drop, and the target is {target}")
    of_tasks = [("--thresholds", thresholds), ("--limit", limit), ("--source", source or None)]
    wrong = [name for name, value in of_tasks if value is not None] if tasks is None else []
    wrong += ["--num-prompts"] if prompts is None and num_prompts is not None else []
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: of {'--tasks' if tasks is None else '--prompts'}, which is not given")


def _open_subject(path: str, engine: dict[str, Any], save: bool) -> EngineSubject:
    """The checkpoint, after a look at whether it has a gate, and can be written to where it shall be."""
    from pipo.evaluation.subject import EngineSubject

    with working(f"Looking at {path}"):
        subject = EngineSubject(path, **engine_arguments(engine))
    if subject.kind != "pipo":
        raise CheckpointError(
            f"{path} is a regular checkpoint, which has no gate; `pipo init` and training make a PIPO checkpoint of it"
        )
    if save and not Path(path).is_dir():
        raise ConfigError(f"--save writes into a folder, and {path} comes from the hub; leave it out, or download it")
    if save and not os.access(subject.folder, os.W_OK):
        raise ConfigError(f"--save: {subject.folder} can't be written to")
    return subject


def _parse_names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in text.split(","))))


def _parse_thresholds(text: str) -> list[float]:
    try:
        found = sorted({float(one) for one in text.split(",")})
    except ValueError:
        raise ConfigError(f"--thresholds takes numbers, such as {THRESHOLDS}, got {text!r}") from None
    if wrong := [one for one in found if not 0 <= one <= 1]:
        raise ConfigError(
            f"a threshold of --thresholds is from 0 to 1 (never committing is measured too), got {wrong[0]:g}"
        )
    return found


def _write(curve: Curve, path: str, target: Target, confident: bool, chosen: Point | None) -> dict[str, Any]:
    """Write `curve.json`; what it holds."""
    from pipo.evaluation.export import plain
    from pipo.evaluation.tuning import is_certain
    from pipo.run_record import write_run_record

    of_accuracy = target.measure == "accuracy-drop"
    found: dict[str, Any] = {
        "model": path,
        "target": {"measure": target.measure, "value": target.value},
        "confident": confident,
        "measured_on": curve.measured_on,
        "curve": [{name: value for name, value in plain(point).items() if value is not None} for point in curve.points],
        "threshold": None if chosen is None else chosen.threshold,
        "certain": is_certain(chosen, target) if of_accuracy and chosen is not None else None,
        "notes": curve.notes,
    }
    curve.folder.mkdir(parents=True, exist_ok=True)
    write_run_record(curve.folder / CURVE, found)
    return found


def _save(subject: EngineSubject, chosen: Point) -> Path:
    from pipo.model.save import save_threshold

    return save_threshold(subject.folder, chosen.threshold)


def _show(curve: Curve, path: str, target: Target, chosen: Point | None, saved: Path | None) -> None:
    """The curve and the choice, for people, and how it comes into use."""
    screen = console(stderr=False)
    screen.print(curve_table(curve.points, chosen))
    screen.print(str(curve.folder / CURVE), markup=False)
    for note in curve.notes:
        console().print(note, markup=False)
    if chosen is None:
        return
    screen.print(describe_choice(chosen, target), markup=False)
    if saved is not None:
        screen.print(f"Saved in {saved}: for requests that name no threshold.", markup=False)
    elif Path(path).is_dir():
        screen.print("The same command with --save writes it into the checkpoint, and measures nothing anew.")
    else:
        screen.print(f"To use it: --threshold {chosen.threshold:g}, or `threshold` in a request.", markup=False)
