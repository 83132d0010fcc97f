"""What `pipo plan` prints for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from pipo.cli.terminal import console, print_wide

if TYPE_CHECKING:
    from pipo.bench.against import Comparison, Figure
    from pipo.bench.cost import Machine
    from pipo.bench.deployment import Deployment, Efficiency
    from pipo.bench.grid import Results, Row
    from pipo.bench.plan import Limits, Load, Prediction


def print_predictions(
    name: str, deployment: Deployment, load: Load, limits: Limits | None, predictions: Sequence[Prediction]
) -> None:
    """A line for each method, under what was assumed."""
    screen = console(stderr=False)
    gpus = f" on each of {deployment.tp}" if deployment.tp > 1 else " on"
    screen.print(f"{name}{gpus} {_machine(deployment.machine)}")
    prompts = f"prompts of {load.prompt:,}"
    replies = "" if load.reply is None else f", replies of {load.reply:,}"
    drafts = "" if load.draft_vocab is None else f", drafts from {load.draft_vocab:,} token ids"
    screen.print(
        f"{load.concurrency:,} request{'s' * (load.concurrency > 1)} of {load.context:,} tokens, {prompts}{replies}; "
        f"commit {load.commit:g}, acceptance {load.acceptance:g}{drafts}"
    )
    screen.print(f"{_assumptions(deployment.efficiency)}\n")
    print_wide(_table(load, limits, predictions))
    for one in predictions:
        if one.reason is not None:
            screen.print(f"{one.method}: {one.reason}", markup=False)


def _table(load: Load, limits: Limits | None, predictions: Sequence[Prediction]) -> Table:
    columns = ["method", "TTFT", "limited by", "TPOT", "limited by", "against regular", "tokens/s per GPU"]
    columns += ["with prompts"] * (load.reply is not None) + ["tokens that fit", "requests that fit"]
    columns += ["requests within limits"] * (limits is not None)
    table = Table(*columns, box=None)
    for one in predictions:
        cells = [one.method, _time(one.ttft_s), one.ttft_limit, _time(one.tpot_s), one.tpot_limit]
        cells += [None if one.against_regular is None else f"{one.against_regular:.2f}×", _number(one.tokens_per_s)]
        cells += [_number(one.served_tokens_per_s)] * (load.reply is not None)
        cells += [_number(one.cache_tokens), _number(one.max_requests)]
        cells += [_number(one.largest_concurrency)] * (limits is not None)
        table.add_row(*(cell or "" for cell in cells))
    return table


def print_comparison(
    results: Results[Row], efficiency: Efficiency, rows: Sequence[Comparison], errors: Mapping[str, float | None]
) -> None:
    """Predicted beside measured, a line for each measured row."""
    from pipo.bench.against import machine_of

    screen = console(stderr=False)
    what = results.shape or ", ".join(results.models)
    screen.print(f"{what} on {_machine(machine_of(results))}, measured in the same run")
    screen.print(f"{_assumptions(efficiency)}\n")
    columns = ["method", "batch", "context", "drafts from"]
    columns += [column for time in ("TTFT", "TPOT", "against regular") for column in (time, "measured", "error")]
    table = Table(*columns, box=None)
    for row in rows:
        vocab = "" if row.draft_vocab is None else f"{row.draft_vocab:,}"
        ratio = ("", "", "") if row.method == "regular" else _figure(row.against_regular, lambda ratio: f"{ratio:.2f}×")
        table.add_row(
            row.method, str(row.batch), f"{row.context:,}", vocab, *_figure(row.ttft), *_figure(row.tpot), *ratio
        )
    print_wide(table)
    names = {"ttft": "of TTFT", "tpot": "of TPOT", "against_regular": "of TPOT against regular"}
    known = [f"{names[name]} {error:.1%}" for name, error in errors.items() if error is not None]
    screen.print(f"\nMedian error, whatever its sign: {', '.join(known)}")


def _figure(figure: Figure | None, show: Callable[[float], str] | None = None) -> tuple[str, str, str]:
    show = show or _time
    return ("", "", "") if figure is None else (show(figure.predicted), show(figure.measured), f"{figure.error:+.1%}")


def _machine(machine: Machine) -> str:
    return (
        f"{machine.name}: {machine.bytes_per_s / 1e9:,.0f} GB/s, {_tera(machine.flops_per_s)} TFLOP/s, "
        f"{machine.memory_bytes / 1e9:,.0f} GB"
    )


def _assumptions(efficiency: Efficiency) -> str:
    return (
        f"assumed: {efficiency.bandwidth:.0%} of the memory's rate, {efficiency.compute:.0%} of the matrix rate, "
        f"{efficiency.overhead_s * 1000:g} ms a step besides, {efficiency.memory:.0%} of the memory in use"
    )


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return (
        f"{seconds:,.2f} s"
        if seconds >= 1
        else f"{seconds * 1000:,.1f} ms"
        if seconds >= 0.01
        else f"{seconds * 1000:.2f} ms"
    )


def _number(number: float | None) -> str:
    return "" if number is None else f"{number:,.0f}"


def _tera(number: float) -> str:
    return f"{number / 1e12:,.0f}" if number >= 1e13 else f"{number / 1e12:.2g}"
