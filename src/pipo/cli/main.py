"""The `pipo` command. Nothing here or in a command's module loads torch before the command runs."""

from __future__ import annotations

from typing import Annotated

import typer

import pipo

app = typer.Typer(
    name="pipo",
    help="Pair-In, Pair-Out language models: two tokens in, up to two tokens out per decoding step.",
    no_args_is_help=True,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pipo {pipo.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Pair-In, Pair-Out language models: two tokens in, up to two tokens out per decoding step."""


def main() -> None:
    """Entry point of the `pipo` script and of `python -m pipo`."""
    app()
