"""`pipo demo`: a PIPO model beside a regular one, on problems that neither has seen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipo.cli.terminal import console
from pipo.errors import ConfigError


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for results.json and report.html; with --train, for all that it makes.")
    ] = Path("pipo-demo"),
    seed: Annotated[int, typer.Option(help="Draws the problems; with --train, everything random.")] = 0,
    num_problems: Annotated[int, typer.Option(min=1, help="Problems to solve, four times each.")] = 100,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the rows of results.json instead of the table.")
    ] = False,
    train: Annotated[
        bool, typer.Option("--train", help="First make the checkpoints from nothing (about 20 minutes on two cores).")
    ] = False,
    checkpoints: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoints that --train made (its OUT/checkpoints), to run the demo on.",
            show_default="the package's",
        ),
    ] = None,
    pipo_model: Annotated[
        Path | None,
        typer.Option(
            "--pipo",
            help="A PIPO checkpoint of your own (of `pipo sft`, `opd` or `merge`) to run beside the package's regular model.",
            metavar="FOLDER",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="With --train: go on where an earlier run in --out stopped.")
    ] = False,
) -> None:
    """Solve fresh problems with a tiny PIPO model and with regular decoding, and report accuracy and speed.

    The checkpoints come with the package; nothing is downloaded and no GPU is needed.
    """
    if resume and not train:
        raise ConfigError("--resume goes with --train: there is nothing else to resume")
    if train and (as_json or checkpoints is not None or pipo_model is not None):
        raise ConfigError(
            "--json, --checkpoints and --pipo go without --train, which runs the demo on the checkpoints that it makes"
        )
    if train:
        from pipo.demo import train as training

        training.main(
            out=out, seed=seed, num_problems=num_problems, resume=resume, console=console(stderr=False, wrap=True)
        )
    else:
        from pipo.demo import run

        run.main(
            out=out,
            seed=seed,
            num_problems=num_problems,
            as_json=as_json,
            console=console(stderr=as_json, wrap=True),
            checkpoints=checkpoints or run.CHECKPOINTS,
            pipo_model=pipo_model,
        )
