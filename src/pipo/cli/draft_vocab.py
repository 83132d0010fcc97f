"""`pipo draft-vocab`: which tokens are worth drafting, from what conversations hold."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipo.cli.options import AUTO, Checkpoint, Device, Dtype
from pipo.cli.terminal import console, print_bad_rows, print_json, progress
from pipo.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipo.data.conversation import Turn
    from pipo.data.written_tokens import WrittenTokens
    from pipo.model.draft_vocab import DraftIds

DEFAULT_SIZE = 32768
NUM_FITTED = 16384
OF_SIZE = (1 / 8, 1 / 4, 1 / 2, 1)
"""Sizes whose coverage is shown, as shares of the one that is asked for."""


def draft_vocab(
    path: Checkpoint,
    data: Annotated[
        list[str],
        typer.Option(help="SFT rows: a file, a folder or a Hugging Face id. May be repeated.", metavar="ROWS"),
    ],
    size: Annotated[int, typer.Option(help="Ids that may be drafted.", min=1)] = DEFAULT_SIZE,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="File to write.",
            show_default="draft_vocab.json in the checkpoint's folder",
            metavar="FILE",
        ),
    ] = None,
    drafts: Annotated[
        int,
        typer.Option(
            help="Drafts that the row for all other ids is fitted to, which loads the model. 0: no such row, and a draft is written "
            "even where the model would rather write another token.",
            min=0,
        ),
    ] = NUM_FITTED,
    subfolder: Annotated[str | None, typer.Option(help="Folder of the checkpoint within PATH.", metavar="NAME")] = None,
    split: Annotated[str, typer.Option(help="Of a dataset.", metavar="NAME")] = "train",
    subset: Annotated[str | None, typer.Option(help="Of a dataset.", metavar="NAME")] = None,
    device: Annotated[Device, typer.Option(help="Where to run the model.")] = Device.AUTO,
    dtype: Annotated[Dtype, typer.Option(help="Number format. auto: as the checkpoint says.")] = Dtype.AUTO,
    seed: Annotated[int, typer.Option(help="The same seed gives the same row.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Choose the tokens that drafts are drawn from, so that the second head is cheaper.

    Counts what assistants write in conversations, and says how much of other conversations the most frequent ids cover. The file that is
    written is used by whatever runs the checkpoint in this project's engine; token 1 is never limited.
    """
    from pipo.engine.loading import find_checkpoint, kind_of
    from pipo.model.draft_vocab import DRAFT_VOCAB, write_draft_ids

    folder = find_checkpoint(path, subfolder)
    if out is None and not Path(path).is_dir():
        raise ConfigError(f"{path} is no folder on this machine: name a file to write with --out")
    target = out or folder / DRAFT_VOCAB
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} is no folder: make it first, or name another file with --out")
    fitted = drafts if kind_of(folder) == "pipo" else 0
    written, kept, always, vocab_size = _count(folder, data, split, subset, size, fitted)
    chosen, report = _choose(written, size, always, vocab_size, data, split, subset)
    if fitted:
        options = {"device": None if device == AUTO else str(device), "dtype": None if dtype == AUTO else str(dtype)}
        chosen, report["elsewhere"] = _fit(folder, chosen, kept, fitted, seed, options)
    write_draft_ids(target, chosen)
    if as_json:
        print_json({**report, "file": target})
        return
    _show(report, target)
    for source, bad in written.bad.items():
        print_bad_rows(source, bad)


Kept = dict[bool, list["tuple[Turn, ...]"]]


def _count(
    folder: Path, data: Sequence[str], split: str, subset: str | None, size: int, fitted: int
) -> tuple[WrittenTokens, Kept, set[int], int]:
    """Token counts; conversations that the row is fitted to (False) and judged by (True); ids that stop; V."""
    import numpy as np

    from pipo.data.conversation import load_tokenizer
    from pipo.data.written_tokens import WrittenTokens, read_conversations
    from pipo.engine.loading import vocabulary_of
    from pipo.model.adapter import tokenizer_home

    tokenizer = load_tokenizer(tokenizer_home(folder))
    if tokenizer is None:
        raise CheckpointError(f"{folder} has no tokenizer, without which texts have no tokens")
    vocab_size, always = vocabulary_of(folder)
    if tokenizer.eos_token_id is not None:
        always.add(int(tokenizer.eos_token_id))
    if not len(always) <= size < vocab_size:
        raise ConfigError(
            f"--size is from {len(always)} (the ids that end a text) to {vocab_size - 1} for this model, whose vocabulary has "
            f"{vocab_size} ids; got {size}"
        )
    written = WrittenTokens(np.zeros(vocab_size, np.int64), np.zeros(vocab_size, np.int64))
    kept: Kept = {False: [], True: []}
    left = {False: 4 * fitted, True: fitted}  # tokens: of the counted ones enough for drafts at every gate
    for held_out, turns in read_conversations(data, tokenizer, written, split=split, subset=subset):
        if left[held_out] > 0:
            kept[held_out].append(turns)
            left[held_out] -= sum(len(ids) for ids, supervised in turns if supervised)
    return written.check(), kept, always, vocab_size


def _choose(
    written: WrittenTokens,
    size: int,
    always: set[int],
    vocab_size: int,
    data: Sequence[str],
    split: str,
    subset: str | None,
) -> tuple[DraftIds, dict[str, Any]]:
    from pipo.data.token_cache import fingerprint_of_source
    from pipo.data.written_tokens import coverages, most_frequent
    from pipo.model.draft_vocab import DraftIds

    sizes = sorted({max(len(always), round(share * size)) for share in OF_SIZE})
    report: dict[str, Any] = {
        "size": size,
        "vocab_size": vocab_size,
        "num_rows": written.num_rows,
        "num_tokens": int(written.counted.sum()),
        "num_held_out_tokens": int(written.held_out.sum()),
        "num_distinct": int((written.counted > 0).sum()),
        "coverage": coverages(written, sizes, always),
        "data": {source: fingerprint_of_source(source, split, subset) for source in data},
    }
    return DraftIds(most_frequent(written.counted, size, always), vocab_size, about=report), report


def _fit(
    folder: Path, chosen: DraftIds, kept: Kept, fitted: int, seed: int, options: dict[str, Any]
) -> tuple[DraftIds, dict[str, Any]]:
    from dataclasses import replace

    from pipo.engine.loading import load_model
    from pipo.model.modeling import PipoForCausalLM
    from pipo.training.elsewhere import fit_elsewhere, look_outside

    model = load_model(folder, "pipo", options["device"], options["dtype"], None)
    assert isinstance(model, PipoForCausalLM)
    outside = []
    for held_out, most in ((False, fitted), (True, max(1, fitted // 4))):
        what = "Judging the row for other ids" if held_out else "Fitting the row for other ids"
        with progress(what, len(kept[held_out])) as advance:
            outside.append(look_outside(model, chosen.ids, kept[held_out], most, seed, lambda _: advance()))
    row, figures = fit_elsewhere(model, *outside)
    return replace(chosen, elsewhere=row, about={**chosen.about, "elsewhere": asdict(figures)}), asdict(figures)


def _show(report: dict[str, Any], target: Path) -> None:
    from rich.table import Table

    screen = console(stderr=False)
    screen.print(
        f"{report['num_tokens']:,} tokens of {report['num_rows']:,} rows, {report['num_distinct']:,} distinct. Of "
        f"{report['num_held_out_tokens']:,} tokens of other rows:",
        markup=False,
    )
    table = Table("ids", "of the vocabulary", "cover", box=None)
    for size, share in report["coverage"].items():
        table.add_row(f"{size:,}", f"{size / report['vocab_size']:.1%}", f"{share:.2%}")
    screen.print(table)
    if (found := report.get("elsewhere")) is not None:
        screen.print(
            f"All other ids: {found['mass']:.2%} of the second head's probability at {found['num_drafts']:,} drafts of other rows; their "
            f"row says {found['estimated']:.2%}, with a mean error of {found['error']:.2%}. So many drafts are rejected more.",
            markup=False,
        )
    screen.print(
        f"{target}: used wherever this engine runs the checkpoint; --draft-vocab off leaves it out", markup=False
    )
