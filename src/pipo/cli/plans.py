"""`--plan` of `pipo sft` and `pipo opd`: what a run would do, for people and for machines."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import yaml
from rich.table import Table

from pipo.cli.terminal import console, print_json
from pipo.cli.training import need_packages

if TYPE_CHECKING:
    from pipo.training.config import TrainingConfig
    from pipo.training.memory import MemoryEstimate
    from pipo.training.plan import ModelPlan, Plan

UNKNOWN = "unknown"


def show_plan(config: TrainingConfig, as_json: bool) -> None:
    """Print the plan of a run. Of several processes, the first prints."""
    need_packages()
    from transformers.utils import logging

    from pipo.training.plan import make_plan

    logging.set_verbosity_error()  # of kernels that are not here: a plan needs none
    if int(os.environ.get("RANK", "0")):
        return
    plan = make_plan(config, int(os.environ.get("WORLD_SIZE", config.run.processes or 1)))
    if as_json:
        print_json(_as_row(plan))
        return
    screen = console(stderr=False)
    screen.print(
        yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True).rstrip(), markup=False
    )
    screen.print()
    screen.print(_table(plan))
    for name, reason in plan.unknown.items():
        screen.print(f"[yellow]unknown[/yellow] {name}: {reason}", markup=True)


def _as_row(plan: Plan) -> dict[str, Any]:
    trained = None
    if plan.trained is not None:
        trained = {**asdict(plan.trained), "lora_layers": plan.lora_layers}
    return {
        "stage": plan.stage,
        "config": plan.config.model_dump(mode="json"),
        "model": _model_row(plan.model),
        "teacher": _model_row(plan.teacher),
        "trained": trained,
        "steps": asdict(plan.steps),
        "memory": None if plan.memory is None else {**asdict(plan.memory), "kernels": plan.kernels},
        "unknown": plan.unknown,
    }


def _model_row(model: ModelPlan | None) -> dict[str, Any] | None:
    return None if model is None else {**asdict(model), "total_parameters": model.total_parameters}


def _table(plan: Plan) -> Table:
    table = Table.grid(padding=(0, 2))

    def row(name: str, value: object) -> None:
        table.add_row(f"[dim]{name}[/dim]", UNKNOWN if value is None else str(value))

    for name, model in (("model", plan.model), ("teacher", plan.teacher)):
        if model is not None:
            row(
                name,
                f"{model.path} ({model.family}, {model.num_layers} layers, width {model.hidden_size:,}; {model.origin})",
            )
            row("", f"{model.total_parameters:>17,}  parameters")
            for part, number in model.num_parameters.items():
                row("", f"{number:>17,}  {part}")
        elif name in plan.unknown or name == "model":
            row(name, None)
    row("trained", plan.trained and plan.trained.describe())
    for layer, number in plan.lora_layers.items():
        row("", f"{number:>17,}  {layer}")
    steps = plan.steps
    row("examples", None if steps.num_examples is None else f"{steps.num_examples:,}")
    row("slots", None if steps.num_slots is None else f"about {steps.num_slots:,} of an epoch")
    row("", f"{steps.max_slots:,} of an example at most")
    row(
        "step",
        f"{steps.examples_per_step} examples on {steps.num_processes} device{'s' if steps.num_processes > 1 else ''}",
    )
    row(
        "steps",
        None if steps.num_steps is None else f"{steps.num_steps:,}, of which {steps.num_warmup_steps:,} warm up",
    )
    if plan.memory is None:
        row("memory", None)
    else:
        _memory_rows(row, plan.memory, plan)
    return table


def _memory_rows(row: Any, memory: MemoryEstimate, plan: Plan) -> None:
    where = "a GPU" if plan.kernels == "cuda" else "the CPU"
    row("memory", f"{memory.peak_bytes / 1e9:.1f} GB on {where} at most, in the phase {memory.peak_phase!r}:")
    for part, number in sorted(memory.components.items(), key=lambda item: -item[1]):
        if number >= 1e6 or number * 1000 >= memory.peak_bytes:
            row("", f"{number / 1e9:>17.3f}  {part}")
    for phase, number in memory.phases.items():
        if phase != memory.peak_phase:
            row("", f"{number / 1e9:>17.3f}  at most in the phase {phase!r}")
    for note in memory.notes:
        row("", note)
