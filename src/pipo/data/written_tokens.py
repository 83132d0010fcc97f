"""How often each token id is written in conversations, and which ids are worth drafting. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipo.data.conversation import Turn
from pipo.data.examples import examples_of_rows
from pipo.data.records import BadRow, SftRow, read_rows
from pipo.errors import DataError

HELD_OUT = 10
"""One row in so many is not counted, and says how much of other texts the counted ones cover."""


@dataclass
class WrittenTokens:
    """Counts by token id, `[V]`: of the rows that decide, and of those that are held out.

    `num_rows`: rows that were read, both kinds. `bad`: of each source, rows that can't be read.
    """

    counted: NDArray[np.int64]
    held_out: NDArray[np.int64]
    num_rows: int = 0
    bad: dict[str, list[BadRow]] = field(default_factory=dict)

    def check(self) -> WrittenTokens:
        """Itself.

        Raises:
            DataError: too few rows to count some and hold some out.
        """
        if not self.counted.sum() or not self.held_out.sum():
            raise DataError(
                f"{self.num_rows} rows are too few for a draft vocabulary: one in {HELD_OUT} is held out to say what it covers, so there "
                f"must be {HELD_OUT} at least, and many more to be of use"
            )
        return self


def read_conversations(
    sources: Sequence[str], tokenizer: Any, counts: WrittenTokens, *, split: str = "train", subset: str | None = None
) -> Iterator[tuple[bool, tuple[Turn, ...]]]:
    """`(held out, turns)` of every conversation of SFT rows, as it is counted into `counts`.

    What the assistant writes is counted, in either slot: after each rejected draft the slots change places, so any of it may be a draft.

    Raises:
        DataError: a source can't be read, or the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("conversations need a tokenizer with a chat template, and this model has none")
    for source in sources:
        rows = read_rows(source, SftRow, split=split, subset=subset)
        bad: list[BadRow] = []
        last = None
        for line, example in examples_of_rows(rows, tokenizer, "", {}, None, bad):
            counts.num_rows += line != last
            last = line
            held_out = counts.num_rows % HELD_OUT == 0
            into = counts.held_out if held_out else counts.counted
            for ids, supervised in example.turns:
                if supervised:
                    np.add.at(into, np.asarray(ids, dtype=np.int64), 1)
            yield held_out, example.turns
        if rows.bad or bad:
            counts.bad[source] = sorted([*rows.bad, *bad], key=lambda row: row.line)


def most_frequent(counts_V: NDArray[np.int64], size: int, always: Collection[int]) -> tuple[int, ...]:
    """`size` ids, ascending: `always`, then the most frequent. Of ids that occur as often the lower goes first, as BPE ranks pieces."""
    order = np.argsort(-counts_V, kind="stable").tolist()
    chosen = dict.fromkeys([*sorted(always), *order])
    return tuple(sorted(list(chosen)[:size]))


def coverage(counts_V: NDArray[np.int64], ids: Iterable[int]) -> float:
    """Share of what was written that is of these ids."""
    return float(counts_V[list(ids)].sum() / counts_V.sum())


def coverages(written: WrittenTokens, sizes: Iterable[int], always: Collection[int]) -> Mapping[int, float]:
    """Of draft vocabularies of several sizes, the share of held-out text that they cover."""
    return {size: coverage(written.held_out, most_frequent(written.counted, size, always)) for size in sizes}
