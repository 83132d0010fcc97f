"""`pipo demo --train`: makes the demo's checkpoints from nothing, in about 15 to 20 minutes on two cores.

Stages run in processes of their own, two at a time where they do not need each other, one thread each. A killed run goes
on with `--resume` from the last saved step of each stage, and ends with the same weights.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pipo.demo.recipe import Recipe, Stage, is_done
from pipo.errors import ConfigError, PipoError

Event = tuple[str, int, float]
"""Stage, steps done, loss of the last step."""

MAX_PROCESSES = 2


def main(out: Path, seed: int, num_problems: int, resume: bool, console: Console) -> None:
    """Trains everything into `out/stages`, writes the checkpoints that the demo uses into `out/checkpoints`, and runs the
    demo on them, on `num_problems` problems.

    Raises:
        ConfigError, PipoError: see :func:`train`.
    """
    recipe = Recipe(seed=seed)
    console.print(
        f"[bold]Training the demo's models from nothing[/bold] into {out} (a killed run goes on with --resume)"
    )
    train(recipe, out, resume, console)

    from pipo.demo import run
    from pipo.demo.ship import ship

    checkpoints = out / "checkpoints"
    with console.status("measuring every stage") as status:
        ship(recipe, out, checkpoints, lambda text: status.update(f"measuring {text}"))
    console.print(f"checkpoints: [bold]{checkpoints}[/bold]\n")
    run.main(out, seed, num_problems, as_json=False, console=console, checkpoints=checkpoints)


def train(recipe: Recipe, out: Path, resume: bool, console: Console) -> None:
    """Runs every stage of `recipe` into `out/stages`.

    Raises:
        ConfigError: `out` holds a training already and `resume` is off, or it was made by another recipe.
        PipoError: a stage failed.
    """
    for stage in recipe.stages:
        stage.validate()
    _claim_folder(recipe, out, resume)
    context = multiprocessing.get_context("spawn")
    events: Queue[Event] = context.Queue()
    running: dict[str, BaseProcess] = {}
    with _progress(console) as progress:
        bars = {stage.name: progress.add_task(stage.name, total=stage.steps, loss="") for stage in recipe.stages}
        try:
            while waiting := [stage for stage in recipe.stages if not is_done(out, stage.name)]:
                for stage in waiting:
                    if len(running) < MAX_PROCESSES and stage.name not in running and _is_ready(stage, out):
                        process: BaseProcess = context.Process(
                            target=_run_in_process, args=(recipe, stage, out, events)
                        )
                        process.start()
                        running[stage.name] = process
                _show(events, progress, bars)
                _reap(running, out)
        finally:
            for process in running.values():
                process.terminate()
                process.join()
        _show(events, progress, bars)
        for stage in recipe.stages:
            progress.update(bars[stage.name], completed=stage.steps)


def _claim_folder(recipe: Recipe, out: Path, resume: bool) -> None:
    """Writes the recipe into `out`, or checks that it is the one there."""
    path, wanted = out / "recipe.json", asdict(recipe)
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(wanted, indent=1) + "\n")
        return
    if not resume:
        raise ConfigError(
            f"{out} holds a training already: pass --resume to go on with it, or name another folder with --out"
        )
    found = json.loads(path.read_text())
    changed = [f"{key} was {found.get(key)}, is {wanted[key]}" for key in wanted if found.get(key) != wanted[key]]
    if changed:
        raise ConfigError(f"{out} was made by another recipe ({'; '.join(changed)}): name another folder with --out")


def _is_ready(stage: Stage, out: Path) -> bool:
    return all(is_done(out, name) for name in (stage.start, stage.teacher) if name is not None)


def _run_in_process(recipe: Recipe, stage: Stage, out: Path, events: Queue[Event]) -> None:
    import torch

    from pipo.demo.stages import run_stage

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None
    last_event = 0.0

    def report(steps_done: int, losses: dict[str, float]) -> None:
        nonlocal last_event
        if not parent.is_alive():
            os._exit(1)
        now = time.monotonic()
        if now - last_event > 0.5 or steps_done == stage.steps:
            last_event = now
            events.put((stage.name, steps_done, losses["loss"]))

    run_stage(recipe, stage, out, report)


def _show(events: Queue[Event], progress: Progress, bars: dict[str, TaskID]) -> None:
    """Draws the events that have come, after waiting a moment for the first."""
    timeout = 0.2
    while True:
        try:
            name, steps_done, loss = events.get(timeout=timeout)
        except Empty:
            return
        progress.update(bars[name], completed=steps_done, loss=f"loss {loss:.3f}")
        timeout = 0.0


def _reap(running: dict[str, BaseProcess], out: Path) -> None:
    for name in [name for name, process in running.items() if not process.is_alive()]:
        process = running.pop(name)
        process.join()
        if process.exitcode != 0 or not is_done(out, name):
            raise PipoError(
                f"training stage {name!r} failed with exit code {process.exitcode}; its error is printed above"
            )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
        console=console,
    )
