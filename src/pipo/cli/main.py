"""The `pipo` command. Nothing here or at the top of a command's module loads torch or transformers."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import pipo
from pipo.cli import (
    bench,
    chat,
    data,
    demo,
    draft_vocab,
    eval,
    export,
    fetch,
    gate,
    generate,
    info,
    init,
    merge,
    opd,
    plan,
    report,
    serve,
    sft,
    study,
    tune_threshold,
)
from pipo.cli.terminal import print_error
from pipo.errors import PipoError

HELP = "Pair-In, Pair-Out language models: two tokens in, up to two tokens out per decoding step."
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class _Root(TyperGroup):
    """Turns what went wrong into an exit status and one line: 2 for the caller's errors, 130 for Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            raise
        except (PipoError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            print_error(str(error))
            raise typer.Exit(EXIT_USER_ERROR) from None


app = typer.Typer(
    name="pipo",
    cls=_Root,
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pipo {pipo.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="PIPO_DEBUG", help="Show the traceback of an error, not only its message.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(demo.demo)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(info.info)
app.command()(init.init)
app.command()(export.export)
app.command()(fetch.fetch)
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")
app.command()(plan.plan)
app.command()(merge.merge)
app.command()(sft.sft)
app.command()(opd.opd)
app.command()(gate.gate)
app.command()(draft_vocab.draft_vocab)
app.add_typer(study.app, name="study")
app.command("eval")(eval.evaluate)
app.command()(tune_threshold.tune_threshold)
app.command()(report.report)


def main() -> None:
    """Entry point of the `pipo` script and of `python -m pipo`."""
    app()
