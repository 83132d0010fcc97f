"""The options that several commands share, each written once.

A command takes a group of them with a decorator and receives the values as one dict: `@takes_sampling` fills the
parameter `sampling`, `@takes_engine` fills `engine`.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipo.engine.request import SamplingParams
from pipo.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from pipo.engine.llm import LLM

AUTO = "auto"
CHECKPOINT, OFF = "checkpoint", "off"
Command = Callable[..., None]

Checkpoint = Annotated[str, typer.Argument(metavar="PATH", help="Checkpoint: a folder or a Hugging Face id.")]

SandboxKind = Annotated[
    str,
    typer.Option(
        "--sandbox",
        help="What programs that a model writes run in: bubblewrap, docker or docker:IMAGE. auto: the first that works.",
        metavar="KIND",
    ),
]
UnsafeLocalExec = Annotated[
    bool,
    typer.Option("--unsafe-local-exec", help="Run programs that a model writes as they are, without a sandbox."),
]


class Method(StrEnum):
    """How to decode. All but `pipo` run a base checkpoint."""

    PIPO = "pipo"
    REGULAR = "regular"
    MTP = "mtp"
    SPECULATIVE = "speculative"


class Device(StrEnum):
    """Where to run. `auto`: the GPU where torch finds one, else the CPU."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Dtype(StrEnum):
    """Number format of weights and activations. `auto`: as the checkpoint says."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Kernels(StrEnum):
    """What computes decoding on a CPU."""

    AUTO = "auto"
    NATIVE = "native"
    TORCH = "torch"


class QuantizedAs(StrEnum):
    """Eight bits for the weights of backbone and MTP block: whole numbers, or floats on GPUs that have them."""

    INT8 = "int8"
    FP8 = "fp8"


def option(name: str, kind: Any, default: Any, panel: str, *args: str, **settings: Any) -> inspect.Parameter:
    """One option of a group, for :func:`takes`; `args` and `settings` as `typer.Option` takes them."""
    annotation = Annotated[kind, typer.Option(*args, rich_help_panel=panel, **settings)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _sampling(name: str, kind: Any, help: str, *args: str, **settings: Any) -> inspect.Parameter:
    default = SamplingParams.__dataclass_fields__[name].default
    return option(name, kind, default, "Sampling", *args, help=help, **settings)


def _task_sampling(name: str, kind: Any, help: str) -> inspect.Parameter:
    panel = "Sampling (as the task says, unless given)"
    return option(name, kind, None, panel, help=help, show_default="the task's")


def _engine(name: str, kind: Any, default: Any, help: str, *args: str, **settings: Any) -> inspect.Parameter:
    return option(name, kind, default, "Engine", *args, help=help, **settings)


SAMPLING_OPTIONS = (
    _sampling(
        "threshold",
        float | None,
        "Commit a draft when its confidence reaches this. 0: always; above 1: never.",
        show_default="the checkpoint's",
    ),
    _sampling("max_tokens", int | None, "Most tokens to write.", show_default="until the context is full"),
    _sampling(
        "max_pairs", int | None, "Most pairs to write, whatever they hold.", show_default="until the context is full"
    ),
    _sampling("min_tokens", int, "No stop before this many tokens."),
    _sampling("temperature", float, "0 is greedy."),
    _sampling("top_p", float, "Keep the likeliest tokens that together have this probability."),
    _sampling("top_k", int, "Keep this many of the likeliest tokens. 0: all."),
    _sampling("min_p", float, "Keep tokens at least this likely, relative to the likeliest."),
    _sampling("presence_penalty", float, "Taken off the logit of a token that was written before."),
    _sampling("frequency_penalty", float, "Taken off the logit of a token for each time that it was written."),
    _sampling("repetition_penalty", float, "Divides the logit of a token in prompt or text. 1: none."),
    _sampling("seed", int | None, "The same seed gives the same text.", show_default="a fresh one"),
    _sampling("stop", list[str], "Stop before this text. May be repeated.", metavar="TEXT"),
    _sampling("stop_token_ids", list[int], "Stop at this token. May be repeated.", "--stop-token-id", metavar="ID"),
    _sampling("ignore_eos", bool, "Go on after end-of-text tokens.", "--ignore-eos"),
    _sampling("logit_bias", list[str], "Add B to the logit of token ID. May be repeated.", metavar="ID=B"),
    _sampling("json_schema", str | None, "Write only JSON of this schema; @FILE reads it from a file.", metavar="JSON"),
    _sampling("regex", str | None, "Write only what this regular expression matches whole.", metavar="REGEX"),
    _sampling(
        "grammar", str | None, "Write only text of this Lark grammar; @FILE reads it from a file.", metavar="LARK"
    ),
)

ENGINE_OPTIONS = (
    _engine("method", Method, Method.PIPO, "How to decode. All but pipo run a base checkpoint, not a PIPO one."),
    _engine("device", Device, Device.AUTO, "Where to run. auto: the GPU where torch finds one, else the CPU."),
    _engine("dtype", Dtype, Dtype.AUTO, "Number format. auto: as the checkpoint says."),
    _engine("subfolder", str | None, None, "Folder of the checkpoint within PATH.", metavar="NAME"),
    _engine("max_num_seqs", int, 64, "Most samples that decode together."),
    _engine(
        "max_model_len",
        int | None,
        None,
        "Most positions of a sample: pairs, or tokens where --method is not pipo.",
        show_default="the model's",
    ),
    _engine(
        "max_prefill_positions",
        int | None,
        None,
        "Most positions of prompts to read between two decoding steps; a longer prompt is read in chunks.",
        show_default="512 on a CPU, else 8192",
    ),
    _engine(
        "cache_budget_bytes",
        int | None,
        None,
        "Most memory for caches.",
        show_default="half of the free memory, or 85% of the GPU's",
    ),
    _engine(
        "draft_vocab",
        str,
        CHECKPOINT,
        "What drafts are drawn from: a file of `pipo draft-vocab`, the first N ids, off (the whole vocabulary), or checkpoint (its own "
        "file, where it has one).",
        metavar="FILE|N|off",
    ),
    _engine(
        "kernels",
        Kernels,
        Kernels.AUTO,
        "What decodes on a CPU: native, kernels of our own that the system's C++ compiler makes on first use; torch, PyTorch's. "
        "auto: native for bfloat16.",
    ),
    _engine(
        "quantization",
        QuantizedAs | None,
        None,
        "Eight bits for the weights of backbone and MTP block, by torchao. int8 runs anywhere, fp8 on newer GPUs.",
        show_default="as stored",
    ),
    _engine(
        "cuda_graphs",
        bool | None,
        None,
        "Decode by captured CUDA graphs, the host one step behind.",
        "--cuda-graphs/--no-cuda-graphs",
        show_default="on a GPU, where the model's step can be captured",
    ),
)

TASK_SAMPLING_OPTIONS = (
    _task_sampling("temperature", float | None, "0 is greedy."),
    _task_sampling("top_p", float | None, "Keep the likeliest tokens that together have this probability."),
    _task_sampling("top_k", int | None, "Keep this many of the likeliest tokens. 0: all."),
    _task_sampling("min_p", float | None, "Keep tokens at least this likely, relative to the likeliest."),
    _task_sampling("presence_penalty", float | None, "Taken off the logit of a token that was written before."),
    _task_sampling("max_tokens", int | None, "Most tokens of a sample, the same for every method."),
    _task_sampling("max_pairs", int | None, "Most steps of a sample, whatever they write: the paper's budget."),
)


def takes(command: Command, group: str, options: Sequence[inspect.Parameter]) -> Command:
    """`command` with `options` in place of its parameter `group`, which receives their values as a dict."""
    signature = inspect.signature(command, eval_str=True)
    kept = [parameter for parameter in signature.parameters.values() if parameter.name != group]
    names = {option.name for option in options}

    def wrapper(**values: Any) -> None:
        grouped = {name: values.pop(name) for name in names}
        command(**values, **{group: grouped})

    keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*kept, *options)]
    wrapper.__signature__ = signature.replace(parameters=keyword_only)  # type: ignore[attr-defined]
    wrapper.__name__ = command.__name__
    wrapper.__doc__ = command.__doc__
    return wrapper


def takes_sampling(command: Command) -> Command:
    """Give `command` the sampling options; their values arrive as its parameter `sampling`."""
    return takes(command, "sampling", SAMPLING_OPTIONS)


def takes_task_sampling(command: Command) -> Command:
    """Give `command` options that go before a task's own sampling; those that were given arrive as its parameter `sampling`."""

    def chosen(sampling: dict[str, Any], **values: Any) -> None:
        command(**values, sampling={name: value for name, value in sampling.items() if value is not None})

    functools.update_wrapper(chosen, command)
    return takes(chosen, "sampling", TASK_SAMPLING_OPTIONS)


def takes_engine(command: Command) -> Command:
    """Give `command` the engine options; their values arrive as its parameter `engine`."""
    return takes(command, "engine", ENGINE_OPTIONS)


def takes_engine_without_method(command: Command) -> Command:
    """As :func:`takes_engine`, for a command with a `--method` of its own."""
    return takes(command, "engine", [option for option in ENGINE_OPTIONS if option.name != "method"])


def chosen_engine_options(engine: dict[str, Any]) -> list[str]:
    """The engine options that have another value than their default, as they are typed."""
    changed = [one.name for one in ENGINE_OPTIONS if one.name in engine and engine[one.name] != one.default]
    return [f"--{name.replace('_', '-')}" for name in changed]


def sampling_params(sampling: dict[str, Any], **more: Any) -> SamplingParams:
    """The `SamplingParams` of option values, `more` on top.

    Raises:
        RequestError: a value out of range, or a bias that is not `ID=B`.
    """
    values = {**sampling, **more}
    values["stop"] = tuple(values["stop"] or ())
    values["stop_token_ids"] = tuple(values["stop_token_ids"] or ())
    values["logit_bias"] = dict(_parse_bias(text) for text in values["logit_bias"] or ()) or None
    for name in ("json_schema", "grammar"):
        values[name] = _text_or_file(values[name])
    return SamplingParams(**values)


def _text_or_file(value: str | None) -> str | None:
    if value is None or not value.startswith("@"):
        return value
    return Path(value[1:]).read_text(encoding="utf-8")


def _parse_bias(text: str) -> tuple[int, float]:
    token_id, equals, bias = text.partition("=")
    try:
        return int(token_id), float(bias if equals else "")
    except ValueError:
        raise RequestError(f"--logit-bias takes ID=B, such as 42=-5, got {text!r}") from None


def open_engine(path: str, engine: dict[str, Any], **more: Any) -> LLM:
    """The engine on checkpoint `path`, as the options say, and `more` as `LLM` takes it."""
    from pipo.engine.llm import LLM

    return LLM(path, **engine_arguments(engine), **more)


def engine_arguments(engine: dict[str, Any]) -> dict[str, Any]:
    """The engine options as `LLM` takes them."""
    vocab: str = engine["draft_vocab"]
    chosen: dict[str, Any] = {name: None if value == AUTO else value for name, value in engine.items()}
    chosen["draft_vocab"] = None if vocab == OFF else int(vocab) if vocab.isdecimal() else vocab
    return chosen


def parse_json_options(option: str, texts: list[str]) -> dict[str, Any]:
    """The values of an option that takes `NAME=JSON`.

    Raises:
        ConfigError: one has another form.
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            found[name] = json.loads(value if equals and name else "")
        except ValueError:
            raise ConfigError(f"{option} takes NAME=JSON, such as enable_thinking=false, got {text!r}") from None
    return found
