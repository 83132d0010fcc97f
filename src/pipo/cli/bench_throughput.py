"""`pipo bench throughput`: tokens per second under load, and what each request waits for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pipo.cli.bench_options import (
    AsJson,
    AsReport,
    as_seconds,
    make_setting,
    split_numbers,
    takes_setting,
)
from pipo.cli.terminal import console, growing_progress, print_wide
from pipo.errors import ConfigError

if TYPE_CHECKING:
    from pipo.bench.grid import Results
    from pipo.bench.throughput import Load, LoadRow

REQUESTS_EACH = 4
"""Requests, for each that is in flight."""
DEFAULT_CONCURRENCY = "1,4,16"
OPEN_LOOP_REQUESTS = 64


@takes_setting
def throughput(
    setting: dict[str, Any],
    concurrency: Annotated[
        str | None,
        typer.Option(
            help="Requests in flight: where one ends, the next begins; with commas.",
            metavar="N,…",
            show_default=DEFAULT_CONCURRENCY,
        ),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(
            help="In place of that, requests that arrive a second, at random times; with commas.", metavar="R,…"
        ),
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt, on average.", min=1)] = 512,
    reply: Annotated[int, typer.Option(help="Tokens of a reply, on average.", min=1)] = 128,
    vary: Annotated[
        float, typer.Option(help="Share by which lengths differ from these, at most. 0: not at all.")
    ] = 0.5,
    requests: Annotated[
        int | None,
        typer.Option(
            help="Requests of a load.",
            min=1,
            show_default=f"{REQUESTS_EACH} for each in flight; {OPEN_LOOP_REQUESTS} with --rate",
        ),
    ] = None,
    json_file: AsJson = None,
    report: AsReport = None,
) -> None:
    """Tokens per second under load, and times to first token and per token of its requests.

    Requests go through the engine as those of `pipo serve` do, greedy, to their ends; each method gets the same ones. Time to first
    token is from arrival, so it holds what a request waited. Throughput is from the first arrival to the last token.
    """
    from pipo.bench.grid import check_writable, write_results
    from pipo.bench.load_page import write_load_page
    from pipo.bench.throughput import bench_throughput

    loads = _loads(concurrency, rate, requests, prompt, reply, vary, setting["seed"])
    check_writable([json_file, report])
    chosen = make_setting(setting)
    found: list[Results[LoadRow]] = []

    def save(results: Results[LoadRow]) -> None:
        found[:] = [results]
        if json_file is not None:
            write_results(json_file, results)
        if report is not None:
            write_load_page(report, results)

    try:
        with growing_progress("Measuring") as advance:
            bench_throughput(chosen, loads, save=save, report=advance)
    finally:
        if found:
            print_loads(found[0])


def _loads(
    concurrency: str | None, rate: str | None, requests: int | None, prompt: int, reply: int, vary: float, seed: int
) -> list[Load]:
    from pipo.bench.throughput import Load

    lengths: dict[str, Any] = {"prompt_tokens": prompt, "reply_tokens": reply, "vary": vary, "seed": seed}
    if rate is None:
        numbers = split_numbers("concurrency", concurrency or DEFAULT_CONCURRENCY)
        return [Load(concurrency=n, num_requests=requests or REQUESTS_EACH * n, **lengths) for n in numbers]
    if concurrency is not None:
        raise ConfigError("--concurrency and --rate both say how requests come: give one of them")
    try:
        rates = [float(part) for part in rate.split(",")]
    except ValueError:
        raise ConfigError(f"--rate takes numbers of requests a second, such as 0.5,2, got {rate!r}") from None
    return [Load(rate=one, num_requests=requests or OPEN_LOOP_REQUESTS, **lengths) for one in rates]


def print_loads(results: Results[LoadRow]) -> None:
    """The rows for people."""
    screen = console(stderr=False)
    open_loop = any(row.rate is not None for row in results.rows)
    load = "requests/s asked" if open_loop else "in flight"
    names = ("requests", "tokens/s", "requests/s", "TTFT p50", "p90", "p99", "TPOT p50", "p90", "p99", "tokens/step")
    table = Table(load, "method", *names, box=None)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in results.rows:
        table.add_row(
            f"{row.rate:g}" if row.rate is not None else f"{row.concurrency:,}",
            row.method,
            f"{row.num_requests:,}",
            f"{row.tokens_per_s:,.1f}",
            f"{row.requests_per_s:.2f}",
            *(as_seconds(seconds) for seconds in (row.ttft_p50_s, row.ttft_p90_s, row.ttft_p99_s)),
            *(as_seconds(seconds) for seconds in (row.tpot_p50_s, row.tpot_p90_s, row.tpot_p99_s)),
            f"{1 + (row.commit or 0):.2f}",
        )
    print_wide(table)
    if not results.complete:
        screen.print("\nThe run was cut short: these are the loads that were finished.")
