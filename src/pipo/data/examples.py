"""Supervised examples: rows of conversations, tokenised once, laid out in slots anew in every epoch. Section 3.1."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from pipo.data.conversation import Turn, TurnTexts, encode_rendered, flat_texts, join_turns, turn_texts
from pipo.data.drop_report import DropReport
from pipo.data.records import BadRow, RowFile, SftRow, read_rows
from pipo.data.token_cache import (
    CacheWriter,
    TokenCache,
    fingerprint_of_source,
    fingerprint_of_tokenizer,
    open_cache,
)
from pipo.errors import ConfigError, DataError
from pipo.pairing import IGNORE_INDEX, Slots, cut_slots, reject_drafts, slots_from_turns, split_pairs

Layout = Literal["split_pairs", "reject_drafts"]
LAYOUTS: Mapping[str, Callable[[Slots, float, random.Random, int], Slots]] = {
    "split_pairs": split_pairs,
    "reject_drafts": reject_drafts,
}
ROWS_AT_ONCE = 64
"""Rows that the tokenizer gets together: it works on as many cores as there are."""
NOTE_EVERY_S = 30.0
"""Between notes on how far tokenising has come."""


@dataclass(frozen=True, slots=True)
class Example:
    """Turns of token ids, and whether each is supervised, for :func:`pipo.pairing.slots_from_turns`."""

    turns: tuple[Turn, ...]


def examples_of_rows(
    rows: RowFile[SftRow],
    tokenizer: Any,
    thinking_prefix: str,
    template_options: Mapping[str, Any],
    num_rows: int | None,
    bad: list[BadRow],
) -> Iterator[tuple[int, Example]]:
    """`(line, example)` of the first `num_rows` rows, in their order; conversations that can't be learned from go to `bad`."""
    pending: list[tuple[int, list[TurnTexts]]] = []
    for line, row in islice(rows, num_rows):
        try:
            pending.append((line, turn_texts(tokenizer, row.messages, thinking_prefix, template_options)))
        except DataError as error:
            bad.append(BadRow(line, str(error)))
        if len(pending) == ROWS_AT_ONCE:
            yield from _tokenise(pending, tokenizer, bad)
            pending = []
    yield from _tokenise(pending, tokenizer, bad)


def _tokenise(
    pending: list[tuple[int, list[TurnTexts]]], tokenizer: Any, bad: list[BadRow]
) -> Iterator[tuple[int, Example]]:
    ids = encode_rendered(tokenizer, [text for _, turns in pending for text in flat_texts(turns)])
    at = 0
    for line, turns in pending:
        end = at + len(flat_texts(turns))
        try:
            yield from [(line, Example(turns)) for turns in join_turns(tokenizer, turns, ids[at:end])]
        except DataError as error:
            bad.append(BadRow(line, str(error)))
        at = end


class SftDataset(Dataset[Slots]):
    """Supervised examples in slots. Item `i` of an epoch is the same in every process and every run of a seed.

    Each example draws its share of PADs from U[0, `max_pad_ratio`], is laid out with them, and is cut at `max_slots`. Examples
    without room for a supervised pair are left out.
    """

    def __init__(
        self, cache: TokenCache, pad_id: int, *, max_slots: int, layout: Layout, max_pad_ratio: float, seed: int
    ) -> None:
        if layout not in LAYOUTS:
            raise ConfigError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        self.pad_id, self.max_slots, self.layout = pad_id, max_slots, layout
        self.max_pad_ratio, self.seed = max_pad_ratio, seed
        self._cache = cache
        self.fingerprint = cache.folder.name
        """Of the rows and of all else that decides their tokens."""
        self._epoch = 0
        fits = cache.counts[:, Count.BEFORE] + 2 <= max_slots
        self._kept = np.flatnonzero(fits)
        self.lengths: list[int] = cache.counts[self._kept, Count.SLOTS].clip(max=max_slots).tolist()
        """Slots of each example before augmentation."""
        self.report = self._report(fits)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Slots:
        """Example `index` as this epoch has it."""
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} examples, got {index}")
        slots = slots_from_turns(self.example(index).turns, self.pad_id)
        rng = random.Random(f"{self.seed}-{self._epoch}-{index}")
        ratio = rng.uniform(0.0, self.max_pad_ratio)
        return cut_slots(LAYOUTS[self.layout](slots, ratio, rng, self.pad_id), self.max_slots)

    def example(self, index: int) -> Example:
        """Example `index` as turns."""
        return Example(self._cache.turns(int(self._kept[index])))

    def set_epoch(self, epoch: int) -> None:
        """Draw the PADs of another epoch. Processes that already read data don't hear of it."""
        self._epoch = epoch

    def _report(self, fits: Any) -> DropReport:
        meta, counts = self._cache.meta["report"], self._cache.counts
        kept = counts[fits]
        # However they are drawn, PADs add at most so many slots: two for each pair that is split, one for each rejected draft.
        most = 2 * np.rint(self.max_pad_ratio * kept[:, Count.DRAFTS])
        if self.layout == "reject_drafts" and self.max_pad_ratio:
            most = kept[:, Count.SUPERVISED]
        report = DropReport(**{**meta, "bad": [BadRow(**row) for row in meta["bad"]]})
        return replace(
            report,
            num_used=len(set(kept[:, Count.LINE].tolist())),
            num_examples=len(kept),
            too_long=sorted(set(counts[~fits, Count.LINE].tolist())),
            num_too_long=int((~fits).sum()),
            num_cut=int((kept[:, Count.SLOTS] > self.max_slots).sum()),
            num_cut_at_most=int((kept[:, Count.SLOTS] + most > self.max_slots).sum()),
            num_slots=sum(self.lengths),
            num_tokens=int(np.diff(self._cache.offsets)[fits].sum()),
            num_supervised_tokens=int(kept[:, Count.SUPERVISED].sum()),
        )


class Count:
    """Columns of a cache's counts."""

    LINE, SLOTS, BEFORE, DRAFTS, SUPERVISED = range(5)


def _write_examples(writer: CacheWriter, examples: Iterator[tuple[int, Example]], note: Callable[[str], None]) -> int:
    """Write all examples; how many rows they are of."""
    lines = set()
    told_at = time.monotonic()
    for line, example in examples:
        writer.add(example.turns, _counts(line, example))
        lines.add(line)
        if time.monotonic() - told_at > NOTE_EVERY_S:
            told_at = time.monotonic()
            note(f"{len(lines)} rows tokenised")
    return len(lines)


def _counts(line: int, example: Example) -> list[int]:
    slots = slots_from_turns(example.turns, 0)
    supervised = [label != IGNORE_INDEX for label in slots.labels]
    return [line, len(supervised), supervised.index(True), sum(supervised[1::2]), sum(supervised)]


def build_sft_dataset(
    source: str | Path,
    tokenizer: Any,
    pad_id: int,
    *,
    max_slots: int,
    thinking_prefix: str,
    template_options: Mapping[str, Any],
    layout: Layout,
    max_pad_ratio: float,
    seed: int,
    cache_dir: str | Path,
    num_examples: int | None = None,
    split: str = "train",
    subset: str | None = None,
    note: Callable[[str], None] | None = None,
) -> SftDataset:
    """The supervised examples of a file of SFT rows, or a dataset of them. Every process of a run may call it at once.

    Args:
        source, split, subset: as :func:`pipo.data.records.read_rows` takes them.
        tokenizer: with a chat template. pad_id: the model's.
        max_slots … seed: settings of :class:`pipo.training.config.SftDataSettings`.
        cache_dir: folder of tokenised caches.
        num_examples: rows to use, from the first.
        note: told what is going on.

    Raises:
        DataError: no rows, no template, nothing to train on, or no place for a cache. ConfigError: an unknown layout.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("conversations need a tokenizer with a chat template, and this model has none")
    key = {
        "rows": fingerprint_of_source(str(source), split, subset),
        "split": split,
        "subset": subset,
        "tokenizer": fingerprint_of_tokenizer(tokenizer),
        "chat template": tokenizer.chat_template,
        "template_options": dict(template_options),
        "thinking_prefix": thinking_prefix,
        "num_examples": num_examples,
    }

    tell = note or (lambda _: None)

    def write(writer: CacheWriter) -> dict[str, Any]:
        rows = read_rows(source, SftRow, split=split, subset=subset)
        bad: list[BadRow] = []
        examples = examples_of_rows(rows, tokenizer, thinking_prefix, template_options, num_examples, bad)
        num_used = _write_examples(writer, examples, tell)
        bad_rows = sorted([*rows.bad, *bad], key=lambda row: row.line)
        report = DropReport(str(source), rows.num_read, num_used, writer.num_examples, bad_rows)
        return {"report": report.check().as_dict()}

    cache = open_cache(Path(cache_dir), str(source), key, write, tell)
    dataset = SftDataset(cache, pad_id, max_slots=max_slots, layout=layout, max_pad_ratio=max_pad_ratio, seed=seed)
    dataset.report.source = str(source)  # the rows may have been elsewhere when they were tokenised
    dataset.report.check()
    return dataset
