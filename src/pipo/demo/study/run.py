"""Runs the gate study, one unit of work after the other. Each leaves a file; a killed study goes on after the last one."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.status import Status

from pipo.demo.recipe import Stage, is_done
from pipo.demo.stages import run_stage
from pipo.demo.study.fits import fit_gates, fit_settings, head_path
from pipo.demo.study.measure import ALWAYS, NEVER, Player, Point, measure, measure_regular, set_thresholds
from pipo.demo.study.page import write_page
from pipo.demo.study.plan import MODELS, ORACLE, OWN, Gate, Study, StudyRecipe
from pipo.demo.study.results import summarise
from pipo.demo.world import Problem, draw_problems
from pipo.errors import ConfigError

Say = Callable[[str], None]
TEST_SEED, TUNING_SEED = 98_000, 87_000
"""Where each seed's problems are drawn from."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of work that is done or not. `work` reports how far it is, in words."""

    title: str
    done: Callable[[], bool]
    work: Callable[[Say], None]


def main(out: Path, num_seeds: int, study: Study, console: Console, page: Path | None = None) -> None:
    """Does what is left of the study in `out`, and writes what it found into `page` (by default `out`).

    Raises:
        ConfigError: `out` holds a study with other settings, or another process works on one of its seeds.
    """
    for seed in range(num_seeds):
        work_on_seed(out, seed, study, console)
    results, page = summarise(out, study, num_seeds), page or out
    write_page(results, page)
    console.print(f"[bold]{page / 'gate.md'}[/bold]")


def work_on_seed(out: Path, seed: int, study: Study, console: Console) -> None:
    """Does what is left of one seed's work in `out`. Several processes may each work on a seed of their own.

    Raises:
        ConfigError: as :func:`main`.
    """
    _claim_folder(study, out)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small to share
    try:
        with _alone(seed_folder(out, seed)):
            units = list(units_of_seed(study, out, seed))
            for index, unit in enumerate(units, 1):
                if unit.done():
                    continue
                place = f"{index}/{len(units)} {unit.title}"
                with console.status(place) as status:
                    unit.work(partial(_show, status, place))
                console.print(place)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds a seed's folder against other processes. The lock goes with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{folder} is being worked on by another process: wait for it, or name another seed"
            ) from error
        yield


def _show(status: Status, place: str, text: str) -> None:
    status.update(f"{place}: {text}")


def seed_folder(out: Path, seed: int) -> Path:
    """Where everything of one seed lies."""
    return out / f"seed-{seed}"


def units_of_seed(study: Study, out: Path, seed: int) -> Iterator[Unit]:
    """The work of one seed, in order."""
    study = replace(study, recipe=replace(study.recipe, seed=seed))
    folder = seed_folder(out, seed)
    for stage in study.recipe.stages:
        yield _stage_unit(study.recipe, stage, folder)
    for name, gates in MODELS.items():
        if fitted := [gate for gate in gates if gate.kind == "fitted"]:
            yield _fit_unit(study, folder, name, fitted)
    for name in ("base", "teacher"):
        yield _regular_unit(study, folder, name)
    for name, gates in MODELS.items():
        for gate in gates:
            yield _curve_unit(study, folder, name, gate)


def _stage_unit(recipe: StudyRecipe, stage: Stage, folder: Path) -> Unit:
    def work(say: Say) -> None:
        run_stage(recipe, stage, folder, lambda done, losses: say(f"{done}/{stage.steps}, loss {losses['loss']:.3f}"))

    return Unit(f"seed {recipe.seed}: train {stage.name}", lambda: is_done(folder, stage.name), work)


def _fit_unit(study: Study, folder: Path, name: str, gates: Sequence[Gate]) -> Unit:
    paths = [head_path(folder, name, gate) for gate in gates]
    return Unit(
        f"seed {study.recipe.seed}: fit gates on {name}",
        lambda: all(path.is_file() for path in paths),
        partial(fit_gates, study, folder, name, gates),
    )


def _regular_unit(study: Study, folder: Path, name: str) -> Unit:
    path = points_path(folder, name)

    def work(say: Say) -> None:
        _write_points(path, [measure_regular(folder, name, _test_problems(study), study.recipe.seed)])

    return Unit(f"seed {study.recipe.seed}: measure {name}", path.is_file, work)


def _curve_unit(study: Study, folder: Path, name: str, gate: Gate) -> Unit:
    """Every point of a gate's curve. What rejects nothing, and what rejects all, is measured with the model's own gate too."""
    path = points_path(folder, name, gate)

    def work(say: Say) -> None:
        seed, problems = study.recipe.seed, _test_problems(study)
        player = Player(folder, name, gate, problems)
        thresholds = {"always": ALWAYS}
        if gate == ORACLE:
            thresholds = {ORACLE.name: 0.5}
        else:
            say("setting thresholds")
            tuning = draw_problems(TUNING_SEED + seed, study.num_tuning_problems, "train")
            targets = sorted(study.tokens_per_step, reverse=True)
            found = set_thresholds(player, tuning, targets, seed)
            thresholds |= {f"{target:g}": tau for target, tau in zip(targets, found, strict=True)}
        if gate == OWN:
            thresholds["never"] = NEVER
        points = []
        for point, threshold in thresholds.items():
            say(point)
            points.append(measure(player, point, problems, threshold, seed))
        _write_points(path, points)

    return Unit(f"seed {study.recipe.seed}: measure {name} with gate {gate.name}", path.is_file, work)


def points_path(folder: Path, name: str, gate: Gate | None = None) -> Path:
    """Where the points of a model lie."""
    return folder / "points" / (f"{name}.json" if gate is None else f"{name}.{gate.name}.json")


def _test_problems(study: Study) -> list[Problem]:
    return draw_problems(TEST_SEED + study.recipe.seed, study.num_problems, "test")


def _write_points(path: Path, points: Sequence[Point]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".partial")
    written.write_text(json.dumps([asdict(point) for point in points]) + "\n")
    os.replace(written, path)


def _claim_folder(study: Study, out: Path) -> None:
    """Writes the settings into `out`, or checks that they are those there."""
    path = out / "study.json"
    wanted = json.loads(json.dumps({**study.as_json(), "fit": fit_settings(study).model_dump()}))
    if not path.exists():
        if out.exists() and any(not found.name.startswith("study.") for found in out.iterdir()):
            raise ConfigError(f"{out} holds other files and no study: name another folder with --out")
        out.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(f".{os.getpid()}")  # two seeds may be started at once
        written.write_text(json.dumps(wanted, indent=1) + "\n")
        os.replace(written, path)
        return
    found = json.loads(path.read_text())
    changed = [name for name in wanted if found.get(name) != wanted[name]]
    if changed:
        raise ConfigError(
            f"{out} holds a study with other settings ({', '.join(changed)}): name another folder with --out"
        )
