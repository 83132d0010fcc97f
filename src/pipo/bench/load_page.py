"""The page of `pipo bench throughput`: tokens per second and waiting times over the load. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pipo.bench.grid import Results
from pipo.bench.plots import Page, make_chart, styles_of, write_page
from pipo.bench.throughput import LoadRow
from pipo.pages.curves import Curve, Spot


def write_load_page(path: Path, results: Results[LoadRow]) -> None:
    """Write the page, whole or not at all."""
    rows = results.rows
    x_label = "requests that arrive a second" if any(row.rate is not None for row in rows) else "requests in flight"
    charts = [
        make_chart("Throughput", _curves(rows, lambda r: (r.tokens_per_s,) * 3), x_label, "tokens/s of all requests"),
        make_chart("Time to first token", _curves(rows, _ttft_s), x_label, "TTFT, s"),
        make_chart("Time per token", _curves(rows, _tpot_ms), x_label, "TPOT, ms"),
    ]
    page = Page(
        title=f"Throughput of {results.shape or ', '.join(results.models)}",
        lead="Every method got the same requests. Times are medians over requests; lines up from them end at the 99th percentile.",
        charts=charts,
        columns=(
            "method",
            "load",
            "requests",
            "tokens/s",
            "requests/s",
            "TTFT, s: p50",
            "p90",
            "p99",
            "TPOT, ms: p50",
            "p90",
            "p99",
        ),
        rows=[_cells(row) for row in rows],
    )
    write_page(path, page, results)


def _ttft_s(row: LoadRow) -> tuple[float, float, float]:
    return row.ttft_p50_s, row.ttft_p50_s, row.ttft_p99_s


def _tpot_ms(row: LoadRow) -> tuple[float, float, float]:
    return 1e3 * row.tpot_p50_s, 1e3 * row.tpot_p50_s, 1e3 * row.tpot_p99_s


def _curves(rows: Sequence[LoadRow], read: Callable[[LoadRow], tuple[float, ...]]) -> list[Curve]:
    curves = []
    for method, style in styles_of(row.method for row in rows).items():
        spots = []
        for row in (one for one in rows if one.method == method):
            value, low, high = read(row)
            spots.append(Spot(row.rate or row.concurrency or 1, value, low, high, f"{method}: {value:,.3g}"))
        curves.append(Curve(method, style, spots))
    return curves


def _cells(row: LoadRow) -> list[str]:
    return [
        row.method,
        f"{row.rate:g}/s" if row.rate is not None else f"{row.concurrency:,} in flight",
        f"{row.num_requests:,}",
        f"{row.tokens_per_s:,.1f}",
        f"{row.requests_per_s:.2f}",
        *(f"{seconds:.3f}" for seconds in (row.ttft_p50_s, row.ttft_p90_s, row.ttft_p99_s)),
        *(f"{1e3 * seconds:.2f}" for seconds in (row.tpot_p50_s, row.tpot_p90_s, row.tpot_p99_s)),
    ]
