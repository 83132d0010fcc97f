"""The page of `pipo bench memory`: caches and peaks over context. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pipo.bench.grid import Results
from pipo.bench.memory import MemoryRow
from pipo.bench.plots import Page, make_chart, styles_of, write_page
from pipo.pages.curves import Curve, Spot


def write_memory_page(path: Path, results: Results[MemoryRow]) -> None:
    """Write the page, whole or not at all."""
    rows = [row for row in results.rows if row.error is None]
    charts = []
    for batch in sorted({row.batch for row in rows}):
        some = [row for row in rows if row.batch == batch]
        cache = _curves(some, lambda row: row.cache_bytes, lambda row: row.predicted_bytes)
        charts.append(make_chart(f"Cache at batch {batch:,}", cache, "tokens of context", "MB"))
        peak = _curves(some, lambda row: row.peak_bytes, lambda row: row.cache_bytes)
        charts.append(make_chart(f"Peak beyond the weights at batch {batch:,}", peak, "tokens of context", "MB"))
    page = Page(
        title=f"Memory of decoding {results.shape or ', '.join(results.models)}",
        lead="Each point is a process of its own. Dashed: what the cache’s entries take by the model’s sizes; beside the peak, the cache.",
        charts=charts,
        columns=(
            "method",
            "batch",
            "context",
            "cache, MB",
            "by the sizes, MB",
            "peak beyond weights, MB",
            "before, MB",
        ),
        rows=[_cells(row) for row in rows],
        notes=[
            f"{r.method}, batch {r.batch}, context {r.context:,}: {r.error}"
            for r in results.rows
            if r.error is not None
        ],
    )
    write_page(path, page, results)


def _curves(
    rows: Sequence[MemoryRow], read: Callable[[MemoryRow], int | None], bound: Callable[[MemoryRow], int | None]
) -> list[Curve]:
    curves = []
    for method, style in styles_of(row.method for row in rows).items():
        mine = [row for row in rows if row.method == method]
        curves.append(Curve(method, style, [_spot(row, read(row)) for row in mine]))
        curves.append(Curve(method, style, [_spot(row, bound(row)) for row in mine], dashed=True))
    return curves


def _spot(row: MemoryRow, number: int | None) -> Spot:
    megabytes = (number or 0) / 1e6
    return Spot(row.context, megabytes, megabytes, megabytes, f"{row.method}: {megabytes:,.1f} MB")


def _cells(row: MemoryRow) -> list[str]:
    numbers = (row.cache_bytes, row.predicted_bytes, row.peak_bytes, row.resting_bytes)
    return [
        row.method,
        f"{row.batch:,}",
        f"{row.context:,}",
        *("" if number is None else f"{number / 1e6:,.1f}" for number in numbers),
    ]
