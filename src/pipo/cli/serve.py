"""`pipo serve`: an OpenAI-compatible server and its playground."""

from __future__ import annotations

import logging
import shlex
import sys
from typing import Annotated, Any

import typer

from pipo.cli.options import Checkpoint, open_engine, takes_engine
from pipo.cli.terminal import console, working
from pipo.errors import ConfigError

PREFIX_CACHE_BYTES = 2**30
REMEMBERED_TOKENS = 2**20

REGULAR_METHOD = "regular"


@takes_engine
def serve(
    path: Checkpoint,
    engine: dict[str, Any],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on. 0: a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="PIPO_API_KEY",
            help="Key that every request but those to /health must bring. Better in PIPO_API_KEY than on the command line.",
        ),
    ] = None,
    allow_unauthenticated: Annotated[
        bool, typer.Option("--allow-unauthenticated", help="Let other machines in (--host) without a key.")
    ] = False,
    allow_weight_updates: Annotated[
        bool,
        typer.Option(
            "--allow-weight-updates",
            help="Let clients replace the weights by those of a folder on this machine, as `pipo opd` does with rollout.backend=server.",
        ),
    ] = False,
    served_model_name: Annotated[str, typer.Option(help="The model's name for clients.", metavar="NAME")] = "pipo",
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Of requests that bring none: commit a draft when its confidence reaches this.",
            show_default="the checkpoint's",
        ),
    ] = None,
    regular_model: Annotated[
        str | None,
        typer.Option(help="A regular checkpoint to serve beside it, as the model `regular`.", metavar="PATH"),
    ] = None,
    beside: Annotated[
        str | None,
        typer.Option(
            help="Another PIPO checkpoint to serve beside it, as the model `beside`: one with another gate, say.",
            metavar="PATH",
        ),
    ] = None,
    prefix_cache_bytes: Annotated[
        int, typer.Option(help="Memory for prefixes of earlier requests, which are not read again. 0: none.")
    ] = PREFIX_CACHE_BYTES,
    max_queue: Annotated[int, typer.Option(help="Samples that may wait; more are turned away.")] = 256,
    max_body_bytes: Annotated[int, typer.Option(help="Largest request body.")] = 8 * 2**20,
    request_timeout_s: Annotated[float, typer.Option(help="Seconds for the whole of a request.")] = 600.0,
    drain_timeout_s: Annotated[
        float, typer.Option(help="Seconds that running requests have to finish after SIGTERM.")
    ] = 60.0,
    cors_origin: Annotated[
        list[str], typer.Option(help="Origin whose pages may call the server. May be repeated.", metavar="ORIGIN")
    ] = [],  # noqa: B006 (typer reads the default and never changes it)
) -> None:
    """Serve a checkpoint to any OpenAI client, and a page to try it at /playground.

    SIGTERM lets running requests finish, and then ends.
    """
    try:
        from pipo.server.app import create_app
        from pipo.server.lifecycle import listen, serve_app
        from pipo.server.settings import ServerSettings
    except ImportError as error:
        raise ConfigError(f"serving needs more packages ({error.name}): pip install 'pipo-llm[serve]'") from error
    settings = ServerSettings(
        model_name=served_model_name,
        host=host,
        port=port,
        api_key=api_key,
        allow_unauthenticated=allow_unauthenticated,
        allow_weight_updates=allow_weight_updates,
        threshold=threshold,
        cors_origins=tuple(cors_origin),
        max_queue=max_queue,
        max_body_bytes=max_body_bytes,
        request_timeout_s=request_timeout_s,
        drain_timeout_s=drain_timeout_s,
    )
    settings.validate()
    if allow_weight_updates and engine["quantization"] is not None:
        raise ConfigError(
            "--allow-weight-updates replaces weights in place, and --quantization leaves none to replace: drop one"
        )
    listener = listen(settings)
    with working(f"Loading {path}"):
        memory = {
            "prefix_cache_bytes": prefix_cache_bytes,
            "remember_pairs": REMEMBERED_TOKENS if prefix_cache_bytes else 0,
        }
        models = {settings.model_name: open_engine(path, engine, **memory)}
        if beside is not None:
            models[settings.beside_name] = open_engine(beside, {**engine, "subfolder": None}, **memory)
        if regular_model is not None:
            regular = {**engine, "method": REGULAR_METHOD, "subfolder": None}
            models[settings.regular_name] = open_engine(regular_model, regular)
        if len(models) > 1 and engine["cache_budget_bytes"] is None:  # each took the free memory for its own
            for llm in models.values():
                llm.engine.shrink(llm.engine.budget.total_bytes // len(models))
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    app = create_app(models, settings)
    _welcome(_url(host, listener.getsockname()[1]), settings.model_name, api_key is not None)
    serve_app(app, settings, listener)


def _url(host: str, port: int) -> str:
    """Where a client on this machine finds the server."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}"


def _welcome(url: str, model: str, needs_key: bool) -> None:
    key = ' -H "Authorization: Bearer $PIPO_API_KEY"' if needs_key else ""
    body = shlex.quote(f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}')
    console().print(f"Serving at {url}/v1 (page: {url}/playground)", markup=False)
    console().print(
        f"  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d {body}", markup=False
    )
