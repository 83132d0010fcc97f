"""The page of `pipo bench latency`: times over batch and context, the floors drawn in. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pipo.bench.grid import Results, Row
from pipo.bench.plots import Chart, Page, make_chart, styles_of, write_page
from pipo.pages.curves import Curve, Spot


def write_latency_page(path: Path, results: Results[Row]) -> None:
    """The page of `pipo bench latency`."""
    rows = [row for row in results.rows if row.error is None]
    charts = [*_by_batch(rows), *_by_context(rows)]
    failed = [
        f"{r.method}, batch {r.batch}, context {r.context:,}: {r.error}" for r in results.rows if r.error is not None
    ]
    page = Page(
        title=f"Latency of {results.shape or ', '.join(results.models)}",
        lead="Points are medians of rounds, in which methods took turns; lines through them span all rounds. Dashed: the least time that "
        "the bytes and operations of a step allow on this machine, as measured in the same run.",
        charts=charts,
        columns=(
            "method",
            "batch",
            "context",
            "TTFT, s",
            "floor",
            "TPOT, ms",
            "spread",
            "floor",
            "of the limit",
            "tokens/s",
            "ceiling",
        ),
        rows=[_cells(row) for row in rows],
        notes=failed,
    )
    write_page(path, page, results)


def _by_batch(rows: Sequence[Row]) -> list[Chart]:
    charts = []
    for context in sorted({row.context for row in rows}):
        some = [row for row in rows if row.context == context]
        after = f"after {context:,} tokens"
        charts.append(
            make_chart(f"Time per token {after}", _curves(some, _tpot_ms, lambda r: r.batch), "batch", "TPOT, ms")
        )
        curves = _curves(some, _tokens_per_s, lambda r: r.batch)
        charts.append(make_chart(f"Tokens per second {after}", curves, "batch", "tokens/s of all requests"))
    return charts


def _by_context(rows: Sequence[Row]) -> list[Chart]:
    charts = []
    for batch in sorted({row.batch for row in rows}):
        some = [row for row in rows if row.batch == batch]
        at = f"at batch {batch:,}"
        if len({row.context for row in some}) > 1:
            curves = _curves(some, _tpot_ms, lambda r: r.context)
            charts.append(make_chart(f"Time per token {at}", curves, "tokens of context", "TPOT, ms"))
        curves = _curves(some, _ttft_s, lambda r: r.context)
        charts.append(make_chart(f"Time to first token {at}", curves, "tokens of the prompt", "TTFT, s"))
    return charts


Reading = tuple[float, float, float, float | None]
"""Value, lowest and highest of the rounds, bound."""


def _tpot_ms(row: Row) -> Reading:
    times = [1e3 * seconds for seconds in row.tpot_rounds_s]
    floor = None if row.floor_s is None else 1e3 * row.floor_s
    return 1e3 * (row.tpot_s or 0), min(times), max(times), floor


def _ttft_s(row: Row) -> Reading:
    return row.ttft_s or 0, min(row.ttft_rounds_s), max(row.ttft_rounds_s), row.ttft_floor_s


def _tokens_per_s(row: Row) -> Reading:
    rates = [row.batch / seconds for seconds in row.tpot_rounds_s]
    return row.tokens_per_s or 0, min(rates), max(rates), None if row.floor_s is None else row.batch / row.floor_s


def _curves(rows: Sequence[Row], read: Callable[[Row], Reading], place: Callable[[Row], int]) -> list[Curve]:
    curves = []
    for method, style in styles_of(row.method for row in rows).items():
        spots, bounds = [], []
        for row in (one for one in rows if one.method == method):
            value, low, high, bound = read(row)
            spots.append(Spot(place(row), value, low, high, f"{method}: {value:,.3g} ({low:,.3g} to {high:,.3g})"))
            bounds += [] if bound is None else [Spot(place(row), bound, bound, bound)]
        curves.append(Curve(method, style, spots))
        curves += [Curve(method, style, bounds, dashed=True)] if bounds else []
    return curves


def _cells(row: Row) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    share = None if row.floor_s is None or row.tpot_s is None else row.floor_s / row.tpot_s
    return [
        row.method,
        f"{row.batch:,}",
        f"{row.context:,}",
        number(row.ttft_s, ".3f"),
        number(row.ttft_floor_s, ".3f"),
        number(None if row.tpot_s is None else 1e3 * row.tpot_s, ".2f"),
        number(row.spread, ".0%"),
        number(None if row.floor_s is None else 1e3 * row.floor_s, ".2f"),
        number(share, ".0%"),
        number(row.tokens_per_s, ",.1f"),
        "" if row.ceiling is None else f"{row.ceiling:.2f}×",
    ]
