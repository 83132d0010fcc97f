"""`pipo bench latency`: times to first token and per token over a grid, beside the floor that the machine allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pipo.cli.bench_options import (
    AsJson,
    AsReport,
    as_percent,
    as_seconds,
    as_times,
    describe_speed,
    make_setting,
    split_names,
    split_numbers,
    takes_setting,
)
from pipo.cli.terminal import console, growing_progress, print_wide

if TYPE_CHECKING:
    from pipo.bench.grid import Results, Row


@takes_setting
def latency(
    setting: dict[str, Any],
    batch: Annotated[str, typer.Option(help="Requests that decode together; with commas.", metavar="N,…")] = "1,16",
    context: Annotated[str, typer.Option(help="Tokens of a prompt; with commas.", metavar="N,…")] = "512,2048",
    steps: Annotated[int, typer.Option(help="Decoding steps that are timed in each round.", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds; in each, every method runs once.", min=1)] = 3,
    peers: Annotated[
        str,
        typer.Option(
            help="Engines of others beside ours: hf, hf-static, vllm, sglang, llamacpp; with commas.", metavar="NAMES"
        ),
    ] = "",
    peer_python: Annotated[
        list[str] | None,
        typer.Option(help="The interpreter of an environment that has a peer. May be repeated.", metavar="NAME=PATH"),
    ] = None,
    json_file: AsJson = None,
    report: AsReport = None,
) -> None:
    """Times to first token (TTFT) and per token (TPOT) of batches, method beside method, and how far they are from the limit.

    All methods run in the engine, on the same weights, in turns: greedy, to the end, on random prompts. TTFT is from submission to the
    first token of the batch's last request; TPOT is the time of decoding steps per visible token of a request. Figures are medians;
    the spread is (slowest − fastest) / median of the rounds. The floor is the time in which this machine could read the bytes and do the
    operations of a step, as measured before and after, and on a CPU by reading the weights right after each batch; the ceiling is what
    that allows against regular decoding.
    How engines of others are installed and timed: docs/benchmarking.md.
    """
    from pipo.bench.grid import check_writable, grid_points, write_results
    from pipo.bench.latency import Effort, bench_latency
    from pipo.bench.latency_page import write_latency_page
    from pipo.bench.peers import choose_peers

    points = grid_points(split_numbers("batch", batch), split_numbers("context", context))
    check_writable([json_file, report])
    others = choose_peers(split_names(peers), peer_python or ())
    chosen = make_setting(setting)
    found: list[Results[Row]] = []

    def save(results: Results[Row]) -> None:
        found[:] = [results]
        if json_file is not None:
            write_results(json_file, results)
        if report is not None:
            write_latency_page(report, results)

    try:
        with growing_progress("Measuring") as advance:
            bench_latency(chosen, points, Effort(steps, rounds), peers=others, save=save, report=advance)
    finally:
        if found:
            print_latency(found[0])


def print_latency(results: Results[Row]) -> None:
    """The rows for people: decoding, then first tokens."""
    screen = console(stderr=False)
    screen.print("Decoding")
    print_wide(_table(results.rows, decoding=True))
    screen.print("\nFirst token")
    print_wide(_table(results.rows, decoding=False))
    rounds = {len(row.tpot_rounds_s) for row in results.rows if row.error is None}
    for row in results.rows:
        if row.error is not None:
            screen.print(f"{row.method}, batch {row.batch}, context {row.context}: {row.error}", markup=False)
    rates = [row.bytes_per_s for row in results.rows if row.bytes_per_s is not None]
    if rates:
        screen.print(
            f"\nFloors are of how fast the weights could be read right after each batch: {min(rates) / 1e9:.1f} to "
            f"{max(rates) / 1e9:.1f} GB/s. "
            "× regular is the median over the rounds."
        )
    speeds = [describe_speed(one) for one in (results.machine, results.machine_after) if one is not None]
    screen.print(f"Medians of {max(rounds, default=0)} rounds. The machine, before and after: {'; '.join(speeds)}")
    if not results.complete:
        screen.print("The run was cut short: these are the points that were finished.")


def _table(rows: tuple[Row, ...], *, decoding: bool) -> Table:
    from pipo.bench.grid import gain

    names = ("TPOT", "tokens/s", "tokens/step") if decoding else ("TTFT",)
    table = Table(
        "batch", "context", "method", *names, "spread", "floor", "of the limit", "× regular", "ceiling", box=None
    )
    for column in table.columns[3:]:
        column.justify = "right"
    for row in rows:
        if row.error is not None:
            continue
        regular = next((one for one in rows if one.point == row.point and one.method == "regular"), None)
        seconds = row.tpot_s if decoding else row.ttft_s
        floor, ceiling = (row.floor_s, row.ceiling) if decoding else (row.ttft_floor_s, row.ttft_ceiling)
        times = None if regular is None else gain(row, regular, first=not decoding)
        more = (f"{row.tokens_per_s:,.1f}", f"{1 + (row.commit or 0):.2f}") if decoding else ()
        table.add_row(
            f"{row.batch:,}",
            f"{row.context:,}",
            row.method,
            as_seconds(seconds),
            *more,
            as_percent(row.spread if decoding else row.ttft_spread),
            as_seconds(floor),
            as_percent(None if floor is None or not seconds else floor / seconds),
            as_times(times),
            as_times(ceiling),
        )
    return table
