"""`pipo bench sampling`: what the draw of a token costs."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.table import Table

from pipo.cli.terminal import print_json, print_wide, progress
from pipo.errors import ConfigError


class SamplingDevice(StrEnum):
    """Where to run."""

    CPU = "cpu"
    CUDA = "cuda"


def sampling(
    vocab: Annotated[str, typer.Option(help="Sizes of the vocabulary.", metavar="A,B")] = "151936,248320",
    batch: Annotated[str, typer.Option(help="Rows of a step.", metavar="A,B")] = "1,16,64",
    device: Annotated[SamplingDevice, typer.Option(help="Where to run.")] = SamplingDevice.CPU,
    deviation: Annotated[
        float, typer.Option(help="Standard deviation of the random logits: the larger, the fewer tokens are likely.")
    ] = 3.0,
    rounds: Annotated[int, typer.Option(help="Draws that are timed, of each kind.")] = 20,
    threads: Annotated[
        int | None, typer.Option(help="Threads of the CPU.", min=1, show_default="as many as torch takes")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Time from logits to one token per row, by what the requests ask for. A step of PIPO draws twice.

    Milliseconds: the median of the draws, and the fastest. On a CPU, of processor time by the number of threads, so that other work on
    the machine does not count.
    """
    import torch

    from pipo.bench.sampling import REQUESTS, bench_sampling

    vocab_sizes, batches = _numbers("--vocab", vocab), _numbers("--batch", batch)
    if threads is not None:
        torch.set_num_threads(threads)
    with progress("Measuring", total=len(vocab_sizes) * len(batches) * len(REQUESTS)) as advance:
        costs = bench_sampling(
            vocab_sizes, batches, device=str(device), deviation=deviation, rounds=rounds, report=advance
        )
    if as_json:
        print_json([{**vars(cost), "median_s": cost.median_s} for cost in costs])
        return
    table = Table("request", "vocabulary", "batch", "median, ms", "fastest, ms", box=None)
    for cost in costs:
        figures = (f"{1e3 * cost.median_s:.2f}", f"{1e3 * min(cost.seconds):.2f}")
        table.add_row(cost.request, f"{cost.vocab_size:,}", str(cost.batch), *figures)
    print_wide(table)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} takes whole numbers such as 1,16, got {text!r}") from None
