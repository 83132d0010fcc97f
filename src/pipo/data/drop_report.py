"""What became of every row of training data: nothing is left out unheard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipo.data.records import BadRow
from pipo.errors import DataError

NAMED_ROWS = 5
"""Rows that are named one by one in a text; the report itself holds them all."""


@dataclass
class DropReport:
    """Rows that were read and what they gave, as counts. Bad and too long rows are named by line."""

    source: str
    num_rows: int = 0
    """Read, the bad ones included."""
    num_used: int = 0
    """Rows that are trained on."""
    num_examples: int = 0
    """What they gave: a conversation gives several where the template rewrites history."""
    bad: list[BadRow] = field(default_factory=list)
    too_long: list[int] = field(default_factory=list)
    """Lines of rows with an example that is left out, because what precedes the first supervised token fills its slots."""
    num_too_long: int = 0
    """Examples that are left out for that."""
    num_cut: int = 0
    """Examples that are cut, before any PAD augmentation."""
    num_cut_at_most: int = 0
    """Examples that are cut however many PADs augmentation draws."""
    num_slots: int = 0
    """Of an epoch without augmentation, cut examples counted as cut."""
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    """Of the whole examples, before any cut."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def check(self) -> DropReport:
        """Itself.

        Raises:
            DataError: nothing is left to train on.
        """
        if not self.num_examples:
            raise DataError(f"nothing to train on. {'. '.join(self.lines())}")
        return self

    def lines(self) -> list[str]:
        """For a reader."""
        found = [f"{self.source}: {self.num_rows} rows read, {self.num_used} used, {self.num_examples} examples"]
        if self.num_tokens:
            found[0] += (
                f" of {self.num_tokens} tokens, {self.num_supervised_tokens} of them supervised, in {self.num_slots} slots"
            )
        if self.bad:
            named = [f"line {bad.line}: {bad.reason}" for bad in self.bad[:NAMED_ROWS]]
            found.append(f"{len(self.bad)} rows can't be used: {_listed(named, len(self.bad))}")
        if self.num_too_long:
            named = [str(line) for line in self.too_long[:NAMED_ROWS]]
            found.append(
                f"{self.num_too_long} examples are left out, whose prompts are too long: lines {_listed(named, len(self.too_long))}"
            )
        if self.num_cut_at_most:
            most = f" (at most {self.num_cut_at_most} with their PADs)" if self.num_cut_at_most > self.num_cut else ""
            found.append(f"{self.num_cut} examples are cut{most}")
        return found


def _listed(named: Sequence[str], number: int) -> str:
    return "; ".join(named) + (f"; … ({number} in all)" if number > len(named) else "")
