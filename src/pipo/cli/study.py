"""`pipo study`: questions about the method that the demo's world can answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipo.cli.terminal import console
from pipo.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True, help="Studies on the demo's world: training, measuring, and the page that says what came out."
)


@app.callback()
def _group() -> None:
    pass


@app.command("gate")
def study_gate(
    out: Annotated[Path, typer.Option(help="Folder for all that the study makes.")] = Path("pipo-study-gate"),
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds: 0, 1, 2, … Each is trained from nothing.")] = 3,
    only_seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Work on this seed alone and write no page: a process for each seed shares the study among cores. "
            "Give the command without it afterwards.",
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(help="Folder for the page, its plots and its figures (gate.md, gate.json).", show_default="--out"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A miniature of all of it, in under a minute. Its figures mean nothing.")
    ] = False,
) -> None:
    """Which gate keeps the most drafts at equal accuracy: gates, what they see, what they learn, and PAD ratios.

    Trains small models from nothing, fits gates on them and measures accuracy against tokens per step. A study that was stopped goes
    on where it was when the same command is given again.
    """
    from pipo.demo.study.plan import FULL, QUICK
    from pipo.demo.study.run import main, work_on_seed

    study, terminal = QUICK if quick else FULL, console(stderr=False, wrap=True)
    if only_seed is None:
        main(out, seeds, study, terminal, page)
        return
    if page is not None:
        raise ConfigError("--page: --only-seed writes no page; give the command without it afterwards")
    work_on_seed(out, only_seed, study, terminal)
