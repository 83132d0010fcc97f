"""`pipo generate`: prompts in, text out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipo.cli.options import Checkpoint, open_engine, sampling_params, takes_engine, takes_sampling
from pipo.cli.prompts import Prompt, collect_prompts
from pipo.cli.results import as_row, describe
from pipo.cli.terminal import console, print_error, print_json, progress, working

if TYPE_CHECKING:
    from pipo.engine.llm import LLM
    from pipo.engine.request import RequestOutput, SamplingParams

EXIT_FAILED = 1


@takes_engine
@takes_sampling
def generate(
    path: Checkpoint,
    sampling: dict[str, Any],
    engine: dict[str, Any],
    prompt: Annotated[
        list[str], typer.Option(help="Text to go on from; - reads standard input. May be repeated.", metavar="TEXT")
    ] = [],  # noqa: B006 (typer reads the default and never changes it)
    prompts_file: Annotated[
        str | None,
        typer.Option(
            help='Prompts as JSON lines: a string, {"prompt": …}, {"prompt_token_ids": […]} or {"messages": […]}; - reads '
            "standard input.",
            metavar="FILE",
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Give each text to the chat template as a user's message.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system message.", metavar="TEXT")] = None,
    n: Annotated[int, typer.Option(help="Samples for each prompt.")] = 1,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: log-probabilities of each token and of this many alternatives.")
    ] = None,
    record_pairs: Annotated[
        bool, typer.Option("--record-pairs", help="With --json: each pair's draft, confidence and fate.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a list of results as JSON, prompts × n in order.")
    ] = False,
) -> None:
    """Generate text from one or many prompts.

    The text goes to standard output, and what it took to standard error. Exits with 1 when a sample ended with an error.
    """
    prompts = collect_prompts(prompt, prompts_file, chat, system)
    params = sampling_params(sampling, n=n, logprobs=logprobs, record_pairs=record_pairs)
    with working(f"Loading {path}"):
        llm = open_engine(path, engine)
    if len(prompts) == n == 1 and not as_json:
        outputs = [show_stream(llm, prompts[0], params)]
    else:
        with progress("Generating", len(prompts) * n) as advance:
            outputs = llm.generate(prompts, params, on_finish=advance)
        if as_json:
            print_json([as_row(output) for output in outputs])
        else:
            show_texts(outputs, n)
    num_errors = sum(output.finish_reason == "error" for output in outputs)
    if num_errors:
        print_error(
            f"{num_errors} of {len(outputs)} samples ended with an error; `pipo info {path}` checks the weights"
        )
        raise typer.Exit(EXIT_FAILED)


def show_texts(outputs: list[RequestOutput], n: int) -> None:
    """Write the texts of all samples, each with what it took."""
    for number, output in enumerate(outputs):
        console().print(f"[bold]── prompt {number // n + 1}, sample {output.index + 1}[/bold]")
        typer.echo(output.text)
        console().print(f"[dim]{describe(output)}[/dim]")


def show_stream(llm: LLM, prompt: Prompt, params: SamplingParams) -> RequestOutput:
    """Write one prompt's text as it comes, then what it took."""
    for event in llm.stream(prompt, params):
        typer.echo(event.text, nl=False)
    typer.echo()
    console().print(f"[dim]{describe(event.output)}[/dim]")
    return event.output
