"""`pipo bench kernels`: what the CPU kernels reach."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from pipo.cli.terminal import console, print_json, print_wide, progress
from pipo.errors import ConfigError


def kernels(
    shape: Annotated[
        str, typer.Option(help="Sizes of the model, by a name such as qwen3-0.6b.", metavar="NAME")
    ] = "qwen3-0.6b",
    rows: Annotated[
        str, typer.Option(help="Rows of inputs: requests that decode together.", metavar="A,B")
    ] = "1,4,16,32",
    rounds: Annotated[int, typer.Option(help="Rounds; in each, every way runs once.")] = 7,
    threads: Annotated[
        int | None, typer.Option(help="Threads of the CPU.", min=1, show_default="as many as torch takes")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Products of a few rows with bfloat16 weights on this CPU: our kernels beside PyTorch's products and the machine's limit.

    GB/s are of the weights, each read once.
    """
    import torch

    from pipo.bench.kernels import bench_kernels, products_of

    try:
        numbers = [int(number) for number in rows.split(",")]
    except ValueError:
        raise ConfigError(f"--rows takes whole numbers such as 1,16, got {rows!r}") from None
    if threads is not None:
        torch.set_num_threads(threads)
    with progress("Measuring", total=len(numbers) * len(products_of(shape))) as advance:
        costs, machine = bench_kernels(shape, numbers, rounds=rounds, report=advance)
    if as_json:
        print_json({"machine": asdict(machine), "products": [asdict(cost) for cost in costs]})
        return
    table = Table("product", "weights", "rows", "ours", "PyTorch", "limit", "of the limit", box=None)
    for cost in costs:
        rates = [
            f"{cost.weight_bytes / seconds / 1e9:.1f} GB/s" for seconds in (cost.ours_s, cost.torch_s, cost.floor_s)
        ]
        sizes = f"{cost.outputs:,} × {cost.inputs:,}"
        table.add_row(cost.name, sizes, str(cost.rows), *rates, f"{cost.floor_s / cost.ours_s:.0%}")
    screen = console(stderr=False)
    print_wide(table)
    screen.print(
        f"\nMedians of {rounds} rounds on {machine.name}: {machine.bytes_per_s / 1e9:.1f} GB/s, "
        f"{machine.flops_per_s / 1e12:.2f} TFLOP/s"
    )
