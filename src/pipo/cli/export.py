"""`pipo export`: a PIPO checkpoint in the authors' layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipo.cli.options import Checkpoint
from pipo.cli.saving import Layout, refuse_full_folder, save_model, save_tokenizer
from pipo.cli.terminal import console, print_json, working


def export(
    path: Checkpoint,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must be new or empty.")],
    layout: Annotated[
        Layout, typer.Option(help="reference: the authors' layout. pipo: this project's, from any layout.")
    ] = Layout.REFERENCE,
    subfolder: Annotated[str | None, typer.Option(help="Folder of the checkpoint within PATH.", metavar="NAME")] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The base model of an adapter: a folder or a Hugging Face id.", show_default="the one it names"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write a PIPO checkpoint in the authors' layout, or turn theirs into ours.

    PATH may be in either layout, or an adapter folder, whose weights are merged. Weights keep their values and dtype.
    """
    refuse_full_folder(out)
    with working(f"Loading {path}"):
        from pipo.model.modeling import PipoForCausalLM

        model = PipoForCausalLM.from_pretrained(path, subfolder=subfolder, base=base)
    with working(f"Writing {out}"):
        save_model(model, out, layout)
        has_tokenizer = save_tokenizer(path, out, subfolder, base)
    if as_json:
        print_json({"out": out, "layout": str(layout), "tokenizer": has_tokenizer})
    else:
        console().print(f"Wrote {out} in the {layout} layout{'' if has_tokenizer else ', without a tokenizer'}")
