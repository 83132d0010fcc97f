"""`pipo data`: questions, a teacher's rollouts, and training rows from them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipo.cli import rollout
from pipo.cli.terminal import console, print_bad_rows, print_json
from pipo.errors import ConfigError

if TYPE_CHECKING:
    from pipo.data.records import BadRow
    from pipo.data.select import SelectReport

TINY_WORLD = "tiny-world"

app = typer.Typer(help="Questions, a teacher's rollouts, and training rows from them.", no_args_is_help=True)
app.command()(rollout.rollout)


class Keep(StrEnum):
    """Which samples of a question stay."""

    ALL = "all"
    SHORTEST = "shortest"


class Side(StrEnum):
    """A side of the tiny world's split."""

    TRAIN = "train"
    TEST = "test"


Rollouts = Annotated[list[str], typer.Argument(metavar="ROLLOUTS...", help="Files of rollouts, or Hugging Face ids.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="File to write.", metavar="FILE")]
Share = Annotated[
    float,
    typer.Option(
        help="Share of the questions, from the first, that are for SFT; the rest are for OPD. Give both commands the same."
    ),
]
SplitSeed = Annotated[
    int | None, typer.Option(help="Split at random by this seed. Give both commands the same.", show_default="by order")
]
MinAccuracy = Annotated[
    float | None, typer.Option(help="Only questions of which the teacher got this share right, or more.")
]
MaxAccuracy = Annotated[
    float | None, typer.Option(help="Only questions of which the teacher got this share right, or less.")
]
Repeated = Annotated[bool, typer.Option("--repeated", help="Keep what was there before: the same question or text.")]
SkipBadRows = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Go on past rows that can't be read; they are named all the same.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]


@app.command()
def sft(
    rollouts: Rollouts,
    out: Out,
    sft_share: Share = 0.9,
    split_seed: SplitSeed = None,
    keep: Annotated[Keep, typer.Option(help="All samples that may stay, or the shortest.")] = Keep.ALL,
    max_per_question: Annotated[
        int | None,
        typer.Option(
            help="Most samples of a question, of each file that has it.", show_default="1 for shortest, else no limit"
        ),
    ] = None,
    min_accuracy: MinAccuracy = None,
    max_accuracy: MaxAccuracy = None,
    min_tokens: Annotated[int | None, typer.Option(help="Fewest tokens of a completion.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of a completion.")] = None,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Keep completions that a limit cut off.")] = False,
    incorrect: Annotated[
        bool, typer.Option("--incorrect", help="Keep completions that are wrong or were never checked.")
    ] = False,
    repeated: Repeated = False,
    thinking_prefix: Annotated[
        str, typer.Option(help=r"Put this before completions that lack it: '<think>\n'.", metavar="TEXT")
    ] = "",
    skip_bad_rows: SkipBadRows = False,
    as_json: AsJson = False,
) -> None:
    """Make SFT rows of rollouts: right and finished answers to the first part of the questions.

    Reports what was left out and why; the counts add up.
    """
    from pipo.data.records import write_rows
    from pipo.data.select import SelectReport, SelectSettings, select_sft

    settings = SelectSettings(
        sft_share=sft_share,
        split_seed=split_seed,
        min_accuracy=min_accuracy,
        max_accuracy=max_accuracy,
        keep=keep.value,
        max_per_question=max_per_question,
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        unfinished=unfinished,
        incorrect=incorrect,
        repeated=repeated,
        thinking_prefix=thinking_prefix.replace("\\n", "\n"),
        skip_bad_rows=skip_bad_rows,
    )
    _refuse_source(out, rollouts)
    report = SelectReport("sft")
    write_rows(out, select_sft(rollouts, settings, report))
    _show(report, out, as_json)


@app.command()
def opd(
    rollouts: Rollouts,
    out: Out,
    sft_share: Share = 0.9,
    split_seed: SplitSeed = None,
    min_accuracy: MinAccuracy = 0.5,
    max_accuracy: MaxAccuracy = None,
    repeated: Repeated = False,
    skip_bad_rows: SkipBadRows = False,
    as_json: AsJson = False,
) -> None:
    """Make OPD rows of rollouts: the questions of the last part that the teacher can answer.

    Reports what was left out and why; the counts add up.
    """
    from pipo.data.records import write_rows
    from pipo.data.select import SelectReport, SelectSettings, select_opd

    settings = SelectSettings(
        sft_share=sft_share,
        split_seed=split_seed,
        min_accuracy=min_accuracy,
        max_accuracy=max_accuracy,
        repeated=repeated,
        skip_bad_rows=skip_bad_rows,
    )
    _refuse_source(out, rollouts)
    report = SelectReport("opd")
    write_rows(out, select_opd(rollouts, settings, report))
    _show(report, out, as_json)


@app.command()
def questions(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="tiny-world, dapo-math, codeforces, a file, a folder or a Hugging Face id."
        ),
    ],
    out: Out,
    num: Annotated[int | None, typer.Option(min=1, help="Only so many, from the first.", show_default="all")] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="How rows are laid out: dapo-math, codeforces or questions.", show_default="as SOURCE says"),
    ] = None,
    subset: Annotated[str | None, typer.Option(help="Of a dataset.", metavar="NAME")] = None,
    split: Annotated[str, typer.Option(help="Of a dataset.", metavar="NAME")] = "train",
    seed: Annotated[int, typer.Option(help="Of tiny-world: which problems are drawn.")] = 0,
    side: Annotated[Side, typer.Option(help="Of tiny-world: the side of its split.")] = Side.TRAIN,
    skip_bad_rows: SkipBadRows = False,
    as_json: AsJson = False,
) -> None:
    """Write a source's questions to a file, each with what checks its answer.

    The file is a source for `pipo data rollout`, and rows of it are rows for `pipo opd`.
    """
    from pipo.data.records import write_rows
    from pipo.data.sources import open_questions

    bad: list[BadRow] = []
    if source == TINY_WORLD:
        from pipo.demo.questions import card_questions

        if num is None or num < 1:
            raise ConfigError("tiny-world has no end: say how many problems with --num")
        count = write_rows(out, card_questions(num, seed, side.value))
    else:
        found = open_questions(source, kind=kind, split=split, subset=subset)
        _refuse_source(out, [source])
        wanted = itertools.islice(found, num)
        count = write_rows(out, wanted) if skip_bad_rows else write_rows(out, wanted, check=found.check)
        bad = found.bad
    if as_json:
        print_json({"num_questions": count, "bad": [asdict(row) for row in bad], "file": out})
        return
    console(stderr=False).print(f"{count} questions in {out}", markup=False)
    print_bad_rows(source, bad)


def _refuse_source(out: Path, sources: Sequence[str]) -> None:
    """Raise `ConfigError` where the file to write is one that is read: it would be gone."""
    for source in sources:
        path = Path(source).expanduser()
        if path.exists() and out.expanduser().exists() and out.expanduser().samefile(path):
            raise ConfigError(f"{out} is what is read; name another file to write, or {out} would be lost")


def _show(report: SelectReport, out: Path, as_json: bool) -> None:
    about: dict[str, Any] = report.as_dict()
    if as_json:
        print_json({**about, "file": out})
        return
    from rich.table import Table

    unit = about["unit"]
    table = Table("", f"{unit}s", box=None)
    table.add_row("in the rollouts", f"{report.num_candidates:,}")
    for reason, count in report.dropped.most_common():
        table.add_row(f"  {reason}", f"−{count:,}")
    table.add_row(f"in {out}", f"{report.num_kept:,}")
    console(stderr=False).print(table)
    for file, rows in report.bad.items():
        print_bad_rows(file, rows)
    if not report.num_kept:
        console().print(f"Nothing of it may stay, so {out} is empty", markup=False)
