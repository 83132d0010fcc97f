"""What a benchmark of decoding found, as a page that stands alone: charts with the floor drawn in, a table, how it was made. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipo.bench.grid import Results
from pipo.data.writing import write_text
from pipo.pages.curves import Curve, curve_chart
from pipo.pages.template import read_asset, render_page

STYLES = {"pipo": "s1", "regular": "s2", "speculative": "s3", "mtp": "s4", "hf-generate": "s5"}
OTHER_STYLES = ("s6", "s7", "s8")


@dataclass(frozen=True)
class Chart:
    """A drawing with its heading and its key: names and CSS classes."""

    title: str
    drawing: Markup
    key: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Page:
    """What a page shows. `rows` of the table are texts, the first field of each a name."""

    title: str
    lead: str
    charts: Sequence[Chart]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def write_page(path: Path, page: Page, results: Results[Any]) -> None:
    """Write a page, whole or not at all.

    Raises:
        OSError: it can't be written.
    """
    template = read_asset("pipo.bench", "page.html.j2")
    write_text(path, render_page(template, page=page, facts=_facts(results), complete=results.complete))


def styles_of(methods: Iterable[str]) -> dict[str, str]:
    """The CSS class of each method, the same in every chart."""
    others = iter(OTHER_STYLES)
    return {name: STYLES.get(name) or next(others, OTHER_STYLES[-1]) for name in dict.fromkeys(methods)}


def make_chart(title: str, curves: Sequence[Curve], x_label: str, y_label: str) -> Chart:
    """A chart of these curves; the key leaves out bounds, which are dashed."""
    key = tuple(dict.fromkeys((curve.name, curve.style) for curve in curves if not curve.dashed))
    return Chart(title, Markup(curve_chart(curves, x_label, y_label, title)), key)


def _facts(results: Results[Any]) -> list[tuple[str, str]]:
    record = results.record
    hardware, versions = record.get("hardware", {}), record.get("versions", {})
    machine = results.machine or {}
    speeds = [
        f"{one['bytes_per_s'] / 1e9:.1f} GB/s, {one['flops_per_s'] / 1e12:.2f} TFLOP/s"
        for one in (results.machine, results.machine_after)
        if one is not None
    ]
    shown = {
        "Model": results.shape or ", ".join(results.models),
        "Number format": results.dtype,
        "Device": f"{results.device}: {machine.get('name') or hardware.get('processor', '')}",
        "Threads": str(hardware.get("num_threads", "")),
        "Measured reading and products, before and after": "; ".join(speeds),
        "Command": " ".join(record.get("arguments", ())),
        "Revision": record.get("git_revision") or "",
        "Versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }
    return [(name, text) for name, text in shown.items() if text]
