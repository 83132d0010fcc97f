"""What commands write: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from pipo.data.records import BadRow

NAMED_ROWS = 20
"""Bad rows that a command names one by one; `--json` holds them all."""


WIDE = 132
"""Characters that a table of a benchmark may take."""


def console(stderr: bool = True, wrap: bool = False) -> Console:
    """A console on stderr (progress, notes) or stdout (results for people). `wrap`: break lines between words."""
    return Console(stderr=stderr, highlight=False, soft_wrap=not wrap)


def print_error(message: str) -> None:
    """The one line that a failed command leaves on stderr."""
    typer.echo(f"pipo: {' '.join(message.split())}", err=True)


def print_json(value: Any) -> None:
    """`value` on stdout as JSON. What has no value there (NaN, infinity) is null."""
    typer.echo(json.dumps(_plain(value), ensure_ascii=False, indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def print_bad_rows(source: str, rows: Sequence[BadRow]) -> None:
    """Name rows that were skipped on stderr, by line, and say how many there are."""
    for row in rows[:NAMED_ROWS]:
        console().print(f"{source}, line {row.line}: {row.reason}", markup=False)
    if rows:
        named = f", of which the first {NAMED_ROWS} are named" if len(rows) > NAMED_ROWS else ""
        console().print(f"{source}: {len(rows)} bad rows are skipped{named}", markup=False)


@contextmanager
def progress(message: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar of `total` steps on stderr while the body runs, which calls what it is given after each.

    Shows nothing where stderr is no terminal.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    screen = console()
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task(message, total=total)
        yield lambda: bar.advance(task)


@contextmanager
def growing_progress(message: str) -> Iterator[Callable[[int], None]]:
    """As :func:`progress`, where the body knows only later how many steps there are: it says so at each."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    screen = console()
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task(message, total=None)
        yield lambda total: bar.update(task, total=total, advance=1)


@contextmanager
def working(message: str) -> Iterator[None]:
    """Show `message` with a spinner on stderr while the body runs; on a stderr that is no terminal, show nothing."""
    with console().status(message):
        yield


def print_wide(table: Table) -> None:
    """A table on stdout whose columns stay whole, also where the terminal is narrow, or there is none."""
    screen = console(stderr=False)
    screen.width = max(screen.width, WIDE)
    screen.print(table)
