"""How `pipo sft` and `pipo opd` carry a run out: its live line, and what they say before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from math import isnan
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipo.cli.terminal import console, print_json
from pipo.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from pipo.training.run import Setup, Summary, Watch
    from pipo.training.trainer import Row

Config = Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="The run's settings.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="group.key=value …", help="Settings that differ, such as optimizer.lr=5e-5 (values are YAML)."
    ),
]
Plan = Annotated[
    bool, typer.Option("--plan", help="Print settings, sizes, steps and a memory estimate, and train nothing.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the last whole checkpoint in run.out; start where there is none.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the summary (or the plan) as JSON.")]


def refuse_contradiction(plan: bool, resume: bool) -> None:
    """Raise `ConfigError` for options that exclude each other."""
    if plan and resume:
        raise ConfigError("--plan trains nothing, so there is nothing to --resume")


def need_packages() -> None:
    """Raise `ConfigError` where the packages of the `train` extra are missing."""
    if missing := [name for name in ("accelerate", "peft") if find_spec(name) is None]:
        raise ConfigError(f"training needs {' and '.join(missing)}: pip install 'pipo-llm[train]'")


def carry_out(run: Callable[[Watch], Summary], as_json: bool) -> None:
    """Run with a live line on stderr, and print the summary on stdout. Of several processes, the main one talks.

    Raises:
        TrainingError: the device has too little memory. And whatever `run` raises.
    """
    import torch

    from pipo.training import distributed

    try:
        with _live() as watch:
            summary = run(watch)
        if not distributed.is_main():
            return
        if as_json:
            print_json(summary)
        else:
            _print(summary)
    except KeyboardInterrupt:
        if distributed.is_main():
            console().print("Stopped. The same command with --resume goes on from the last checkpoint")
        raise
    except torch.OutOfMemoryError as error:
        first, *_ = str(error).splitlines()
        raise TrainingError(
            f"{first} Lower run.batch_size (and raise run.accumulation), data.max_slots or rollout.max_slots, or turn "
            "run.gradient_checkpointing on: --plan estimates what a step takes. --resume goes on from the last checkpoint"
        ) from error
    finally:
        distributed.stop()


@contextmanager
def _live() -> Iterator[Watch]:
    """A bar with the last report's figures where stderr is a terminal; else a line for each report."""
    from pipo.training.run import Watch

    screen = console()
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("", visible=False)
        total = 0

        def started(setup: Setup, first_step: int, num_steps: int) -> None:
            nonlocal total
            total = num_steps
            screen.print(setup.trainable.describe())
            if first_step:
                screen.print(f"Going on after step {first_step} of {num_steps}")
            bar.update(task, total=num_steps, completed=first_step, visible=True)

        def row(found: Row) -> None:
            loss, speed = f"loss {found['loss']:.3f}", f"{found['slots_per_s']:,.0f} slots/s"
            bar.update(task, completed=int(found["step"]), description=f"{loss}  {speed}")
            if not screen.is_terminal:
                screen.print(f"step {int(found['step'])}/{total}  {_describe(found)}")

        yield Watch(started, row, note=screen.print)


def _describe(row: Row) -> str:
    losses = (
        f"loss {row['loss']:.3f} = {row['backbone_loss']:.3f} + {row['mtp_loss']:.3f} + {row['confidence_loss']:.3f}"
    )
    parts = [losses]
    if not isnan(rate := row.get("commit_rate@0.95", float("nan"))):
        parts.append(f"commits {rate:.0%} at τ 0.95")
    if "rollout_tokens" in row:
        parts.append(f"{row['rollout_tokens']:,.0f} tokens a rollout")
    if "rollout_accuracy" in row:
        parts.append(f"{row['rollout_accuracy']:.0%} right")
    parts += [f"lr {row['lr']:.1e}", f"{row['slots_per_s']:,.0f} slots/s"]
    return "  ".join(parts)


def _print(summary: dict[str, Any]) -> None:
    screen = console(stderr=False)
    screen.print(f"{summary['num_steps']} steps done. Run: {summary['out']} (run.json, metrics.jsonl, checkpoints/)")
    if summary["method"] == "lora":
        screen.print(f"Adapter: {summary['final']}")
        screen.print(f"Next: pipo merge {summary['final']}")
    else:
        screen.print(f"Model: {summary['final']}")
        screen.print(f"Next: pipo chat {summary['final']}")
