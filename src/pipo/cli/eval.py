"""`pipo eval`: a model on benchmarks, by one or several ways of decoding."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipo.cli.conditions import THRESHOLD, parse_conditions
from pipo.cli.eval_run import TASK_NAMES, home_of_runs, parse_source, plan_run, run_plan, write_files
from pipo.cli.graders import open_named_graders
from pipo.cli.options import (
    AUTO,
    SandboxKind,
    UnsafeLocalExec,
    chosen_engine_options,
    engine_arguments,
    parse_json_options,
    takes_engine_without_method,
    takes_task_sampling,
)
from pipo.cli.terminal import console, print_json, working
from pipo.errors import ConfigError

if TYPE_CHECKING:
    from pipo.evaluation.settings import EvalSettings
    from pipo.evaluation.subject import Subject

MAX_REQUESTS, TIMEOUT_S, MAX_RETRIES = 64, 3600.0, 5
SERVER = "Server"


def _server_option(help: str, **settings: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=SERVER, **settings)


@takes_engine_without_method
@takes_task_sampling
def evaluate(
    engine: dict[str, Any],
    sampling: dict[str, Any],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Checkpoint, or with --base-url its name there.", metavar="NAME")
    ],
    tasks: Annotated[str, typer.Option("--tasks", "-t", help=f"Of {TASK_NAMES}.", metavar="A,B")],
    method: Annotated[
        str | None,
        typer.Option(
            help="Of pipo, regular, speculative, mtp. With --base-url a name only: the server decodes as it does.",
            show_default="pipo for a PIPO checkpoint, else regular",
            metavar="A,B",
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Of the gate, for pipo. 0: always commit; above 1: never.",
            show_default=f"the checkpoint's; {THRESHOLD} with --base-url",
        ),
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(help="pipo at each of several thresholds.", metavar="threshold=A,B,…")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-k", help="Samples of each question.")] = 4,
    limit: Annotated[
        int | None, typer.Option(help="Only so many questions of each task, from the first.", show_default="all")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same samples.")] = 0,
    source: Annotated[
        list[str],
        typer.Option(
            help="Questions of a task: a file, a folder or a hub id. May be repeated.",
            show_default="the task's own on the hub",
            metavar="TASK=PATH",
        ),
    ] = [],  # noqa: B006 (typer reads the default and never changes it)
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of runs.", show_default="eval in the checkpoint's folder, else eval/NAME here", metavar="DIR"
        ),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(
            help="Name of the run, a folder in DIR. One that is there is gone on with.",
            show_default="from what decides its results, so that the same command goes on",
            metavar="NAME",
        ),
    ] = None,
    rescore: Annotated[bool, typer.Option("--rescore", help="Grade anew what is graded already.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask again for samples that failed in an earlier session.")
    ] = False,
    concurrency: Annotated[
        int | None,
        typer.Option(
            help="Samples in flight.", min=1, show_default="--max-num-seqs, or with --base-url --max-requests"
        ),
    ] = None,
    no_record_pairs: Annotated[
        bool,
        typer.Option(
            "--no-record-pairs",
            help="Keep nothing of single drafts: no calibration, smaller files, and above τ = 1 more speed.",
        ),
    ] = False,
    sandbox: SandboxKind = AUTO,
    unsafe_local_exec: UnsafeLocalExec = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    base_url: Annotated[
        str | None,
        _server_option("Ask this OpenAI-compatible server instead of the engine here.", metavar="URL"),
    ] = None,
    api_key: Annotated[str | None, _server_option("The server's key.", envvar="OPENAI_API_KEY")] = None,
    max_requests: Annotated[int, _server_option("Requests at the same time.")] = MAX_REQUESTS,
    timeout_s: Annotated[float, _server_option("Seconds for one request.")] = TIMEOUT_S,
    max_retries: Annotated[
        int, _server_option("Tries after a failure, with growing waits, before the sample counts as failed.")
    ] = MAX_RETRIES,
    request_field: Annotated[
        list[str], _server_option("A field of each request. May be repeated.", metavar="NAME=JSON")
    ] = [],  # noqa: B006
    template_option: Annotated[
        list[str], _server_option("An option of the chat template. May be repeated.", metavar="NAME=JSON")
    ] = [],  # noqa: B006
) -> None:
    """Evaluate a model: samples of benchmarks' questions, graded, as tables, figures and a page.

    The same command goes on where it was stopped or killed, and a finished run is only read.
    """
    from pipo.evaluation.run import RunOptions

    server = {
        "max_requests": max_requests,
        "timeout_s": timeout_s,
        "max_retries": max_retries,
        "fields": parse_json_options("--request-field", request_field),
        "template_options": parse_json_options("--template-option", template_option),
    }
    subject = _open_subject(model, engine, base_url, api_key, server)
    settings = _settings(
        tasks=tuple(filter(None, (name.strip() for name in tasks.split(",")))),
        conditions=parse_conditions(
            method,
            threshold,
            sweep,
            "pipo" if getattr(subject, "kind", None) == "pipo" else "regular",
            getattr(subject, "threshold", THRESHOLD),
        ),
        num_samples=samples,
        limit=limit,
        seed=seed,
        sampling=sampling,
        sources=dict(parse_source(text) for text in source),
        record_pairs=not no_record_pairs,
    )
    plan = plan_run(settings, subject)
    graders = open_named_graders(plan.graders, sandbox=sandbox, unsafe_local=unsafe_local_exec)
    folder = out or home_of_runs("eval", model, local=base_url is None)
    options = RunOptions(concurrency or subject.concurrency, rescore=rescore, retry_failed=retry_failed)
    name = run or plan.name(subject.describe())
    _check_name(name)
    run_plan(plan, subject, graders, folder / name, options)
    _report(folder / name, as_json)


def _open_subject(
    model: str, engine: dict[str, Any], base_url: str | None, api_key: str | None, server: dict[str, Any]
) -> Subject:
    from pipo.evaluation.subject import EndpointSubject, EngineSubject

    if base_url is not None:
        if chosen := chosen_engine_options(engine):
            raise ConfigError(
                f"{', '.join(chosen)}: of the engine here, which --base-url leaves out; the server has its own"
            )
        return EndpointSubject(base_url, model, api_key=api_key, **server)
    usual: dict[str, Any] = {"max_requests": MAX_REQUESTS, "timeout_s": TIMEOUT_S, "max_retries": MAX_RETRIES}
    usual |= {"fields": {}, "template_options": {}}
    if changed := [name for name in server if server[name] != usual[name]]:
        names = {"fields": "request-field", "template_options": "template-option"}
        told = ", ".join("--" + names.get(name, name).replace("_", "-") for name in changed)
        raise ConfigError(f"{told} needs --base-url; the engine here asks no server")
    with working(f"Looking at {model}"):
        return EngineSubject(model, **engine_arguments(engine))


def _settings(**values: Any) -> EvalSettings:
    from pipo.evaluation.settings import EvalSettings

    settings = EvalSettings(**values)
    settings.validate()
    return settings


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise ConfigError(f"--run takes a name of letters, digits and . + - _ for a folder, got {name!r}")


def _report(path: Path, as_json: bool) -> None:
    """The results as files, and as a table or JSON on stdout."""
    from pipo.cli.eval_table import results_tables, rows_of
    from pipo.evaluation.export import results_json

    results = write_files(path)
    if as_json:
        print_json({"folder": path, **results_json([results])})
    else:
        screen = console(stderr=False)
        screen.print(results_tables(rows_of(results), results.titles))
        screen.print(f"{path}: report.html, results.json, results.csv", markup=False)
    for note in results.notes:
        console().print(note, markup=False)
