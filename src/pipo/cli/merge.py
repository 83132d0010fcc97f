"""`pipo merge`: an adapter and its base become one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipo.cli.options import Dtype
from pipo.cli.saving import Layout, refuse_full_folder, save_model, save_tokenizer
from pipo.cli.terminal import console, print_json, working
from pipo.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from pipo.model.adapter import Adapter


def merge(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Adapter folder, folder of a finished run, or a Hugging Face id.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write; must be new or empty.", metavar="DIR", show_default="ADAPTER-merged"),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The base model, where it has moved: a folder or a Hugging Face id.", show_default="the one it names"
        ),
    ] = None,
    subfolder: Annotated[str | None, typer.Option(help="Folder of the adapter within ADAPTER.", metavar="NAME")] = None,
    layout: Annotated[Layout, typer.Option(help="pipo: this project's layout. reference: the authors'.")] = Layout.PIPO,
    dtype: Annotated[Dtype, typer.Option(help="Number format of the result. auto: the base's.")] = Dtype.AUTO,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Merge an adapter into its base: a whole PIPO checkpoint, with tokenizer and chat template.

    Sums and products are float32; the result is rounded to the base's number format, and the largest change that this makes is
    stated. A base other than the one that the adapter was trained on is refused.
    """
    folder = _find_adapter(adapter, subfolder)
    target = out or _beside(adapter, folder)
    refuse_full_folder(target)
    from pipo.model.adapter import read_adapter
    from pipo.model.checkpoint import merge_adapter
    from pipo.model.convert import as_dtype

    with working(f"Merging {folder}"):
        read = read_adapter(folder, base)
        model, rounding = merge_adapter(folder, base, dtype=as_dtype(str(dtype)))
    with working(f"Writing {target}"):
        has_tokenizer = save_tokenizer(folder, target, base=base)
        save_model(model, target, layout)
    summary = {
        "out": target,
        "adapter": folder,
        "base": read.base,
        "base_checked": read.base_fingerprint is not None,
        "layout": str(layout),
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_merged": len(read.deltas),
        "num_whole": len(read.whole),
        "largest_rounding": rounding.largest,
        "largest_rounding_at": rounding.parameter,
        "tokenizer": has_tokenizer,
    }
    if as_json:
        print_json(summary)
    else:
        _print(read, summary)


def _find_adapter(adapter: str, subfolder: str | None) -> Path:
    """The adapter's folder; that of a run is its `final/`."""
    from pipo.model.adapter import is_adapter
    from pipo.model.files import find_checkpoint

    folder = find_checkpoint(adapter, subfolder)
    if (folder / "run.json").is_file() and not is_adapter(folder):
        if not (folder / "final").is_dir():
            raise CheckpointError(f"run {folder} has no final/ yet: it did not finish; go on with --resume")
        folder = folder / "final"
    if (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is a whole model already: there is nothing to merge")
    if not is_adapter(folder):
        raise CheckpointError(f"{folder} holds no adapter: it has no adapter_config.json")
    return folder


def _beside(adapter: str, folder: Path) -> Path:
    if not Path(adapter).is_dir():
        raise ConfigError(f"{adapter} is no folder here, so nothing can lie beside it; name a folder with --out")
    home = folder.resolve()
    return home.with_name(f"{home.name}-merged")


def _print(read: Adapter, summary: dict[str, Any]) -> None:
    screen = console()
    screen.print(
        f"Wrote {summary['out']} in {summary['dtype']}: {summary['num_merged']} matrices merged and {summary['num_whole']} tensors "
        f"taken whole, into {read.base}"
    )
    if summary["largest_rounding"]:
        screen.print(
            f"Rounding to {summary['dtype']} changed a weight by {summary['largest_rounding']:.2e} at most "
            f"({summary['largest_rounding_at']})"
        )
    if read.base_fingerprint is None:
        screen.print("This adapter does not say which weights it was trained on: only names and shapes were checked")
    if not summary["tokenizer"]:
        screen.print(f"Neither adapter nor base has a tokenizer, so {summary['out']} has none: it takes token ids only")
