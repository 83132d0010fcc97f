"""How `init`, `export` and `merge` write a checkpoint folder."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from pipo.errors import CheckpointError

if TYPE_CHECKING:
    from pipo.model.modeling import PipoForCausalLM


class Layout(StrEnum):
    """How a checkpoint lies on disk."""

    PIPO = "pipo"
    REFERENCE = "reference"


def refuse_full_folder(out: Path) -> None:
    """Raise `CheckpointError` where writing to `out` would mix two checkpoints."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not an empty folder; name a new one")


def save_model(model: PipoForCausalLM, out: Path, layout: Layout) -> None:
    """Write `model` to `out` in `layout`."""
    if layout is Layout.REFERENCE:
        model.export_reference(out)
    else:
        model.save_pretrained(out)


def save_tokenizer(source: str | Path, out: Path, subfolder: str | None = None, base: str | Path | None = None) -> bool:
    """Copy the tokenizer, chat template and generation defaults of checkpoint `source`; False where it has no tokenizer.

    `base` overrides the base model that an adapter names.
    """
    from pipo.model.adapter import tokenizer_home
    from pipo.model.files import copy_tokenizer, find_checkpoint, has_tokenizer

    out.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(tokenizer_home(find_checkpoint(source, subfolder), base), out)
    return has_tokenizer(out)
