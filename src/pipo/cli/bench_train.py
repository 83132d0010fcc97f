"""`pipo bench train|losses`: what training costs on this machine."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pipo.cli.terminal import console, print_json, progress
from pipo.errors import ConfigError

if TYPE_CHECKING:
    from pipo.bench.train import TrainReport


class Stage(StrEnum):
    """Which step."""

    SFT = "sft"
    OPD = "opd"


class BenchDevice(StrEnum):
    """Where to run."""

    CPU = "cpu"
    CUDA = "cuda"


class BenchDtype(StrEnum):
    """Number format of what is not trained; with bfloat16, products are bfloat16 too."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Divergence(StrEnum):
    """A divergence from a teacher."""

    FULL = "full"
    TOPK = "topk"
    SAMPLED = "sampled"


Shape = Annotated[
    str, typer.Option(help="Sizes of the model, by a name such as qwen3.5-4b; a wrong one lists all.", metavar="NAME")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]


def train(
    shape: Shape = "tiny-wide",
    stage: Annotated[Stage, typer.Option(help="Which step to measure.")] = Stage.SFT,
    slots: Annotated[int, typer.Option(help="Slots of a row; all of them supervised.")] = 2048,
    batch: Annotated[int, typer.Option(help="Rows of a step.")] = 1,
    device: Annotated[BenchDevice, typer.Option(help="Where to run.")] = BenchDevice.CPU,
    dtype: Annotated[BenchDtype, typer.Option(help="Number format of what is not trained.")] = BenchDtype.BFLOAT16,
    teacher_shape: Annotated[
        str | None, typer.Option(help="Sizes of OPD's teacher.", metavar="NAME", show_default="those of the student")
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of LoRA.")] = 64,
    mode: Annotated[Divergence, typer.Option(help="OPD's divergence.")] = Divergence.TOPK,
    steps: Annotated[int, typer.Option(help="Steps that are timed in each turn.", min=1)] = 5,
    rounds: Annotated[int, typer.Option(help="Turns of each kind of step, one after the other.", min=1)] = 2,
    threads: Annotated[
        int | None, typer.Option(help="Threads of the CPU.", min=1, show_default="as many as torch takes")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time and memory of a training step with random weights, beside the estimate that --plan gives.

    Compared with plain SFT steps of the regular model: over as many tokens as there are slots, and over half as many, whose backbone
    does as much work as PIPO's. OPD's step holds teacher and training, not the rollouts. Memory is counted beyond what the libraries take;
    seconds, on a CPU, are processor time by the number of threads, so that other work on the machine does not count.
    """
    import torch

    from pipo.bench.train import bench_train
    from pipo.bench.train_step import WORKS, TrainBench

    if threads is not None:
        torch.set_num_threads(threads)
    sizes: dict[str, Any] = {"slots": slots, "batch": batch, "teacher_shape": teacher_shape, "rank": rank}
    choices: dict[str, Any] = {"stage": str(stage), "device": str(device), "dtype": str(dtype), "mode": str(mode)}
    bench = TrainBench(shape, **sizes, **choices)
    with progress("Measuring", total=len(WORKS) * (1 + rounds)) as advance:
        report = bench_train(bench, num_steps=steps, rounds=rounds, report=advance)
    if as_json:
        print_json({**report.as_row(), "machine": _machine(bench.device)})
    else:
        _print_train(report)


def losses(
    shape: Shape = "tiny-wide",
    positions: Annotated[
        list[int] | None, typer.Option("--positions", help="Supervised positions. May be repeated.", metavar="N")
    ] = None,
    mode: Annotated[
        Divergence | None, typer.Option(help="A divergence from a teacher.", show_default="cross-entropy")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Memory of the losses by the number of positions, on the CPU: it does not grow with positions times vocabulary."""
    from pipo.bench.losses import bench_losses

    numbers = positions or [2048, 8192, 32768]
    if min(numbers) < 1:
        raise ConfigError(f"--positions must be at least 1, got {min(numbers)}")
    costs = bench_losses(shape, numbers, None if mode is None else str(mode))  # type: ignore[arg-type]
    if as_json:
        print_json([vars(cost) for cost in costs])
        return
    table = Table("positions", "peak", "logits of all positions", "seconds", box=None)
    for cost in costs:
        table.add_row(f"{cost.num_positions:,}", _gb(cost.peak_bytes), _gb(cost.logits_bytes), f"{cost.seconds:.1f}")
    console(stderr=False).print(table)


def _machine(device: str) -> dict[str, Any]:
    import platform

    import torch
    import transformers

    from pipo.run_record import processor_name

    processor = torch.cuda.get_device_name() if device == "cuda" else processor_name()
    return {
        "processor": processor,
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _print_train(report: TrainReport) -> None:
    from pipo.bench.train_step import WORKS

    bench, screen = report.bench, console(stderr=False)
    names = {
        "stage": f"PIPO {bench.stage.upper()}, {bench.slots:,}",
        "plain": f"plain SFT, {bench.slots:,}",
        "plain_half": f"plain SFT, {bench.slots // 2:,}",
    }
    table = Table("step", "seconds", "range", "tokens/s", "peak", "PIPO's time", box=None)
    for work, cost in report.works.items():
        table.add_row(
            names[work],
            f"{cost.median_s:.3f}",
            f"{min(cost.seconds):.3f}–{max(cost.seconds):.3f}",
            f"{cost.tokens_per_s:,.0f}",
            _gb(cost.peak_bytes),
            f"{report.time_against(work):.2f}×" if work in WORKS[1:] else "",
        )
    screen.print(table)
    measured, estimate = report.works["stage"], report.estimate
    screen.print(f"\nMedians of {len(measured.seconds)} steps each, of {bench.batch} rows of so many slots or tokens")
    screen.print(
        f"Peak memory of the PIPO step: {_gb(measured.peak_bytes)} measured ({_gb(measured.resting_bytes)} of it between steps), "
        f"{_gb(estimate.peak_bytes)} estimated ({report.estimate_error:+.1%}); of the estimate"
    )
    parts = Table(box=None, show_header=False)
    for part, number in sorted(estimate.components.items(), key=lambda item: -item[1]):
        if number >= estimate.peak_bytes / 1000:
            parts.add_row(f"  {_gb(number)}", part)
    screen.print(parts)


def _gb(number: int) -> str:
    return f"{number / 1e9:.3f} GB"
