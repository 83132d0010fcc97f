"""`pipo plan`: what a model will do on a GPU under a load, and how far such predictions are off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipo.cli.terminal import print_json, working
from pipo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from pipo.bench.cost import Machine
    from pipo.bench.deployment import Efficiency

THIS = "this"
PANEL = "Assumptions"


class PlanDtype(StrEnum):
    """Number format of the weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"
    FP8 = "fp8"


def _assumed(help: str, default: str) -> Any:
    return typer.Option(help=help, rich_help_panel=PANEL, show_default=default)


def plan(
    shape: Annotated[
        str | None,
        typer.Option(help="Sizes of the model, by a name such as qwen3.5-4b; a wrong one lists all.", metavar="NAME"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A checkpoint in place of a shape: a folder, or a hub id that is here.", metavar="PATH"),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="A GPU such as h200; a wrong one lists all. this: this machine, measured.", metavar="NAME"),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens that each request has in the cache.")] = 4096,
    concurrency: Annotated[int, typer.Option(help="Requests that decode together.")] = 1,
    prompt: Annotated[int | None, typer.Option(help="Tokens of a prompt.", show_default="--context")] = None,
    reply: Annotated[
        int | None,
        typer.Option(help="Tokens of an answer, to count the time of reading prompts too.", show_default="not counted"),
    ] = None,
    commit: Annotated[float, typer.Option(help="Share of PIPO's drafts that are committed.")] = 0.95,
    acceptance: Annotated[
        float | None, typer.Option(help="Share of speculative decoding's drafts that stand.", show_default="--commit")
    ] = None,
    draft_vocab: Annotated[
        int | None, typer.Option(help="Token ids that drafts are drawn from.", metavar="N", show_default="all")
    ] = None,
    dtype: Annotated[
        PlanDtype, typer.Option(help="Number format of the weights; int8 and fp8 are those of backbone and MTP block.")
    ] = PlanDtype.BFLOAT16,
    tp: Annotated[int, typer.Option(help="GPUs that share the model (tensor parallel).")] = 1,
    ttft_limit: Annotated[
        float | None, typer.Option(help="Find how many requests keep this time to first token.", metavar="SECONDS")
    ] = None,
    tpot_limit: Annotated[
        float | None, typer.Option(help="Find how many requests keep this time per token.", metavar="SECONDS")
    ] = None,
    bandwidth_share: Annotated[float | None, _assumed("Of the memory's rate, what is reached.", "0.8")] = None,
    compute_share: Annotated[float | None, _assumed("Of the matrix rate, what is reached.", "0.6")] = None,
    overhead_ms: Annotated[float | None, _assumed("What a step takes besides.", "0.3")] = None,
    memory_share: Annotated[float | None, _assumed("Of the memory, what weights and cache may take.", "0.9")] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Predict what `pipo bench latency --json FILE` measured, and show the error.", metavar="FILE"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Predict the speed of a model on a GPU, and what fits into its memory: regular, speculative and PIPO decoding.

    Bytes read and operations computed, over what the GPU's maker publishes, or over what this machine is measured to do. No model is
    loaded and nothing is downloaded.
    """
    assumed = {"bandwidth": bandwidth_share, "compute": compute_share, "memory": memory_share}
    assumed["overhead_s"] = None if overhead_ms is None else overhead_ms / 1000
    if against is not None:
        _refuse_beside_against(shape=shape, model=model, gpu=gpu)
        _compare(against, assumed, as_json)
        return
    from pipo.bench.plan import Limits, Load

    if gpu is None:
        raise ConfigError("plan needs --gpu, the name of a GPU, or this for the present machine; a wrong one lists all")
    load = Load(
        context=context,
        prompt=context if prompt is None else prompt,
        concurrency=concurrency,
        commit=commit,
        acceptance=commit if acceptance is None else acceptance,
        draft_vocab=draft_vocab,
        reply=reply,
    )
    given = {name: limit for name, limit in (("ttft_s", ttft_limit), ("tpot_s", tpot_limit)) if limit is not None}
    limits = Limits(**given) if given else None
    with working("Planning"):
        name, config, compressor = _sizes(shape, model)
        efficiency = _efficiency(assumed)
        machine, link = _machine(gpu, str(dtype))
        from pipo.bench.deployment import Deployment
        from pipo.bench.plan import predict

        deployment = Deployment(
            config,
            machine,
            dtype=str(dtype),
            tp=tp,
            link_bytes_per_s=link,
            efficiency=efficiency,
            compressor=compressor,
        )
        predictions = predict(deployment, load, limits)
    if as_json:
        print_json(
            {
                "model": name,
                "machine": asdict(machine),
                "dtype": str(dtype),
                "tp": tp,
                "load": asdict(load),
                "limits": given,
                "efficiency": asdict(efficiency),
                "predictions": [asdict(one) for one in predictions],
            }
        )
        return
    from pipo.cli.plan_table import print_predictions

    print_predictions(name, deployment, load, limits, predictions)


def _sizes(shape: str | None, model: str | None) -> tuple[str, PreTrainedConfig, str]:
    """A model's name, its regular config, and its compressor."""
    from transformers.utils import logging

    from pipo.model.shapes import shape_config
    from pipo.training.plan import read_model

    logging.set_verbosity_error()  # of kernels that are not here: a plan needs none
    if (shape is None) == (model is None):
        raise ConfigError("plan needs one of --shape (a name such as qwen3.5-4b) and --model (a checkpoint)")
    if shape is not None:
        return shape, shape_config(shape), "mlp"
    assert model is not None
    found = read_model(model, None)
    if found is None:
        raise ConfigError(
            f"{model} is no checkpoint that is here, nor one whose sizes are known: take a folder, or --shape"
        )
    config, compressor, _ = found
    return model, config, compressor or "mlp"


def _machine(gpu: str, dtype: str) -> tuple[Machine, float]:
    """The machine, and what its links carry."""
    import torch

    from pipo.bench.deployment import format_of
    from pipo.bench.gpus import find_gpu, gpu_machine

    if gpu.lower() != THIS:
        found = find_gpu(gpu)
        return gpu_machine(found, format_of(dtype).rate), found.link_bytes_per_s
    from pipo.bench.machine import measure_machine

    if dtype == PlanDtype.FP8:
        raise ConfigError(
            "products in fp8 are not measured on this machine: take another --dtype, or a --gpu by its name"
        )
    measured = torch.bfloat16 if dtype == PlanDtype.INT8 else getattr(torch, dtype)
    return measure_machine("cuda" if torch.cuda.is_available() else "cpu", measured), 0.0


def _efficiency(assumed: dict[str, float | None]) -> Efficiency:
    from pipo.bench.deployment import Efficiency

    given: dict[str, Any] = {name: value for name, value in assumed.items() if value is not None}
    return Efficiency(**given)


def _refuse_beside_against(**options: str | None) -> None:
    if wrong := [f"--{name}" for name, value in options.items() if value is not None]:
        raise ConfigError(f"{wrong[0]} has no place beside --against, whose file says what was measured, and where")


def _compare(path: Path, assumed: dict[str, float | None], as_json: bool) -> None:
    from pipo.bench.against import compare, median_error, read_latency

    efficiency = _efficiency(assumed)
    results = read_latency(path)
    with working("Predicting"):
        _, config, _ = _sizes(results.shape, _first(results.models) if results.shape is None else None)
        rows = compare(results, config, efficiency)
    names = ("ttft", "tpot", "against_regular")
    # Regular decoding against itself is no prediction.
    judged = {name: [row for row in rows if name != "against_regular" or row.method != "regular"] for name in names}
    errors = {name: median_error([getattr(row, name) for row in judged[name]]) for name in names}
    if as_json:
        print_json({"efficiency": asdict(efficiency), "median_error": errors, "rows": [row.as_row() for row in rows]})
        return
    from pipo.cli.plan_table import print_comparison

    print_comparison(results, efficiency, rows, errors)


def _first(models: Sequence[str]) -> str | None:
    return models[0] if models else None
