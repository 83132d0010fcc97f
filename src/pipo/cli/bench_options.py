"""The options that benchmarks of decoding share: what runs, and where what was found goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipo.cli.options import Command, Device, Dtype, Kernels, option, takes
from pipo.errors import ConfigError

if TYPE_CHECKING:
    from pipo.bench.subjects import Setting

PANEL = "What runs"
DEFAULT_SHAPE = "tiny-wide"

SETTING_OPTIONS = (
    option(
        "shape",
        str | None,
        None,
        PANEL,
        help="Random weights of these sizes, by a name such as qwen3-0.6b; a wrong one lists all.",
        metavar="NAME",
        show_default=f"{DEFAULT_SHAPE}, where no --model is named",
    ),
    option(
        "model",
        list[str],
        None,
        PANEL,
        help="A checkpoint, a folder or a hub id, in place of --shape. Twice: a regular one and a PIPO one.",
        metavar="PATH",
    ),
    option(
        "methods",
        str | None,
        None,
        PANEL,
        help="Some of regular, mtp, speculative, pipo; with commas.",
        metavar="NAMES",
        show_default="regular,pipo; of checkpoints those that they are for",
    ),
    option(
        "device", Device, Device.AUTO, PANEL, help="Where to run. auto: the GPU where torch finds one, else the CPU."
    ),
    option(
        "dtype", Dtype, Dtype.AUTO, PANEL, help="Number format. auto: bfloat16; of checkpoints the one that they have."
    ),
    option(
        "commit",
        float | None,
        None,
        PANEL,
        help="Share of PIPO's drafts that are committed, whatever the gate says.",
        show_default="1 with random weights; of checkpoints what the gate commits",
    ),
    option(
        "acceptance",
        float | None,
        None,
        PANEL,
        help="Share of speculative decoding's drafts that are accepted.",
        show_default="as --commit",
    ),
    option(
        "threshold",
        float | None,
        None,
        PANEL,
        help="Let the gate commit at this confidence, in place of --commit.",
        show_default="the checkpoint's",
    ),
    option(
        "draft_vocab",
        int | None,
        None,
        PANEL,
        help="Draw drafts from the first N token ids: a second head of so many rows.",
        min=1,
        metavar="N",
        show_default="all, also where a checkpoint has a file of its own",
    ),
    option(
        "kernels",
        Kernels,
        Kernels.AUTO,
        PANEL,
        help="What decodes on a CPU: native, kernels of our own; torch, PyTorch's. auto: native for bfloat16.",
    ),
    option(
        "max_prefill_positions",
        int | None,
        None,
        PANEL,
        help="Most positions of prompts to read between two decoding steps.",
        min=1,
        show_default="512 on a CPU, else 8192",
    ),
    option(
        "threads", int | None, None, PANEL, help="Threads of the CPU.", min=1, show_default="as many as torch takes"
    ),
    option("seed", int, 0, PANEL, help="Of weights, prompts and commits."),
)

AsJson = Annotated[
    Path | None, typer.Option("--json", help="Write rows, machine, versions and arguments there.", metavar="FILE")
]
AsReport = Annotated[
    Path | None, typer.Option("--report", help="Write a page with charts there, for a browser.", metavar="FILE")
]


def takes_setting(command: Command) -> Command:
    """Give `command` the options of what runs; their values arrive as its parameter `setting`."""
    return takes(command, "setting", SETTING_OPTIONS)


def make_setting(chosen: dict[str, Any]) -> Setting:
    """The setting that the options say; sets torch's threads.

    Raises:
        ConfigError: what can't be.
    """
    import torch

    from pipo.bench.subjects import Setting

    values = dict(chosen)
    threads = values.pop("threads")
    if threads is not None:
        torch.set_num_threads(threads)
    models = tuple(values.pop("model") or ())
    if models and values["shape"] is not None:
        raise ConfigError("--shape and --model both say what runs: give one of them")
    if not models and values["shape"] is None:
        values["shape"] = DEFAULT_SHAPE
    device, dtype, methods = str(values.pop("device")), str(values.pop("dtype")), values.pop("methods")
    if device == Device.AUTO:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == Dtype.AUTO:
        dtype = "" if models else "bfloat16"
    engine = {"kernels": str(values.pop("kernels")), "max_prefill_positions": values.pop("max_prefill_positions")}
    names = None if methods is None else tuple(split_names(methods))
    return Setting(models=models, device=device, dtype=dtype or None, methods=names, engine=engine, **values)


def split_names(text: str) -> list[str]:
    """Names with commas between."""
    return [name for name in (part.strip() for part in text.split(",")) if name]


def split_numbers(name: str, text: str) -> list[int]:
    """Whole numbers with commas between.

    Raises:
        ConfigError: naming the option, where one is none, or below 1.
    """
    try:
        numbers = [int(part) for part in split_names(text)]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"--{name} takes whole numbers from 1 on, such as 1,16, got {text!r}")
    return numbers


def describe_speed(machine: Any) -> str:
    """What a machine was measured to do, in words."""
    return f"{machine['bytes_per_s'] / 1e9:.1f} GB/s, {machine['flops_per_s'] / 1e12:.2f} TFLOP/s"


def as_times(ratio: float | None) -> str:
    """A ratio for a table."""
    return "" if ratio is None else f"{ratio:.2f}×"


def as_seconds(seconds: float | None) -> str:
    """A time for a table."""
    if seconds is None:
        return ""
    return (
        f"{seconds:.2f} s"
        if seconds >= 1
        else f"{seconds * 1e3:.1f} ms"
        if seconds >= 1e-2
        else f"{seconds * 1e3:.2f} ms"
    )


def as_percent(share: float | None) -> str:
    """A share for a table."""
    return "" if share is None else f"{100 * share:.0f}%"
