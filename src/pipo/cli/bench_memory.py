"""`pipo bench memory`: what caches hold and what decoding takes beyond the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pipo.cli.bench_options import AsJson, AsReport, make_setting, split_numbers, takes_setting
from pipo.cli.terminal import console, growing_progress, print_wide

if TYPE_CHECKING:
    from pipo.bench.grid import Results
    from pipo.bench.memory import MemoryRow


@takes_setting
def memory(
    setting: dict[str, Any],
    batch: Annotated[str, typer.Option(help="Requests that decode together; with commas.", metavar="N,…")] = "1,16",
    context: Annotated[str, typer.Option(help="Tokens of a prompt; with commas.", metavar="N,…")] = "512,2048",
    steps: Annotated[int, typer.Option(help="Decoding steps after the prefill.", min=1)] = 8,
    json_file: AsJson = None,
    report: AsReport = None,
) -> None:
    """Memory of decoding, method by method: what caches hold beside what the sizes say, and the peak beyond the weights.

    Each point runs in a process of its own. On a CPU the peak is of resident memory; on a GPU, of what the allocator gave out.
    """
    from pipo.bench.grid import check_writable, grid_points, write_results
    from pipo.bench.memory import bench_memory
    from pipo.bench.memory_page import write_memory_page

    points = grid_points(split_numbers("batch", batch), split_numbers("context", context))
    check_writable([json_file, report])
    chosen = make_setting(setting)
    found: list[Results[MemoryRow]] = []

    def save(results: Results[MemoryRow]) -> None:
        found[:] = [results]
        if json_file is not None:
            write_results(json_file, results)
        if report is not None:
            write_memory_page(report, results)

    try:
        with growing_progress("Measuring") as advance:
            bench_memory(chosen, points, steps, save=save, report=advance)
    finally:
        if found:
            print_memory(found[0])


def print_memory(results: Results[MemoryRow]) -> None:
    """The rows for people."""
    screen = console(stderr=False)
    table = Table("batch", "context", "method", "cache", "by the sizes", "peak beyond weights", "before", box=None)
    for column in table.columns[3:]:
        column.justify = "right"
    for row in results.rows:
        if row.error is None:
            numbers = (row.cache_bytes, row.predicted_bytes, row.peak_bytes, row.resting_bytes)
            table.add_row(f"{row.batch:,}", f"{row.context:,}", row.method, *(_mb(number) for number in numbers))
    print_wide(table)
    for row in results.rows:
        if row.error is not None:
            screen.print(f"{row.method}, batch {row.batch}, context {row.context}: {row.error}", markup=False)
    if not results.complete:
        screen.print("\nThe run was cut short: these are the points that were finished.")


def _mb(number: int | None) -> str:
    return "" if number is None else f"{number / 1e6:,.1f} MB"
