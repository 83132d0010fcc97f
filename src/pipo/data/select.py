"""Rollouts to training rows: which questions, which samples, and a report of what was left out and why.

The questions are split once, by their order: the first part is for SFT, the rest for OPD, so that no question is in both.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipo.data.records import BadRow, OpdRow, RolloutRow, SftRow, read_rows
from pipo.data.rollout_settings import read_meta
from pipo.data.rows import digest_of, with_opening
from pipo.errors import ConfigError, DataError

Part = Literal["sft", "opd"]
Keep = Literal["all", "shortest"]


@dataclass(frozen=True)
class SelectSettings:
    """Which questions and which samples."""

    sft_share: float = 0.9
    """The share of the questions, from the first, that are for SFT; the rest are for OPD. 1 or 0: all for one of them."""
    split_seed: int | None = None
    """Split at random by this seed instead of by order."""
    min_accuracy: float | None = None
    max_accuracy: float | None = None
    """Questions of which the teacher got this share of samples right."""
    keep: Keep = "all"
    """SFT: `all` samples that may stay, in order, or the `shortest`."""
    max_per_question: int | None = None
    """SFT: samples of a question at most, of each row that has it; by default one where only the shortest are kept, else no limit."""
    min_tokens: int | None = None
    max_tokens: int | None = None
    """SFT: tokens of a completion."""
    unfinished: bool = False
    """SFT: keep completions that a limit cut off."""
    incorrect: bool = False
    """SFT: keep completions that are wrong or were never checked."""
    repeated: bool = False
    """Keep questions whose prompt came before, and completions whose text did."""
    thinking_prefix: str = ""
    """SFT: put before completions that don't begin with it."""
    skip_bad_rows: bool = False
    """Go on past rows that can't be read. They are reported either way."""

    def validate(self) -> None:
        """Check every field.

        Raises:
            ConfigError: naming the first wrong one.
        """
        for name in ("sft_share", "min_accuracy", "max_accuracy"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{name} must be in [0, 1], got {value}")
        for name in ("max_per_question", "min_tokens", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.keep not in ("all", "shortest"):
            raise ConfigError(f"keep must be all or shortest, got {self.keep!r}")

    @property
    def limit(self) -> int | None:
        """Samples of a question at most."""
        return self.max_per_question or (1 if self.keep == "shortest" else None)


@dataclass
class SelectReport:
    """What became of every candidate: samples for SFT, questions for OPD."""

    part: Part
    num_rows: int = 0
    """Rollout rows that could be read."""
    num_candidates: int = 0
    num_kept: int = 0
    num_tokens: int = 0
    """Of the completions that were kept."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Candidates by the first reason that left each out."""
    bad: dict[str, list[BadRow]] = field(default_factory=dict)
    """Rows that can't be read, by file."""

    def drop(self, reason: str, count: int = 1) -> None:
        """Count candidates that are left out."""
        if count:
            self.dropped[reason] += count

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        assert self.num_kept + self.dropped.total() == self.num_candidates
        bad = {file: [asdict(row) for row in rows] for file, rows in self.bad.items() if rows}
        return {
            **asdict(self),
            "unit": "sample" if self.part == "sft" else "question",
            "dropped": dict(self.dropped),
            "bad": bad,
        }


def select_sft(sources: Sequence[str | Path], settings: SelectSettings, report: SelectReport) -> Iterator[SftRow]:
    """SFT rows of rollout files, in their order. `report` is filled as they are read.

    Raises:
        ConfigError: a setting is out of range.
        DataError: a file can't be read, or holds bad rows and these are not to be skipped.
    """
    seen: set[str] = set()
    for row in _rows_of_part(sources, settings, report):
        reasons = [_sample_fault(row, index, settings) for index in range(row.num_samples)]
        for index in range(row.num_samples):
            digest = digest_of([row.src_item.chat, row.completion_texts[index]])
            if reasons[index] is None and not settings.repeated and digest in seen:
                reasons[index] = "repeated completion"
            if reasons[index] is None:
                seen.add(digest)
        stay = [index for index, reason in enumerate(reasons) if reason is None]
        if settings.keep == "shortest":
            stay.sort(key=lambda index: _length(row, index))
        kept = sorted(stay[: settings.limit])
        report.drop(
            "more than max_per_question" if settings.keep == "all" else "not the shortest", len(stay) - len(kept)
        )
        for reason in filter(None, reasons):
            report.drop(reason)
        for index in kept:
            report.num_kept += 1
            report.num_tokens += row.n_tokens[index] if row.n_tokens else 0
            yield _sft_row(row, index, settings.thinking_prefix)


def select_opd(sources: Sequence[str | Path], settings: SelectSettings, report: SelectReport) -> Iterator[OpdRow]:
    """OPD rows of rollout files, in their order. `report` is filled as they are read.

    Raises:
        ConfigError: a setting is out of range.
        DataError: a file can't be read, or holds bad rows and these are not to be skipped.
    """
    for row in _rows_of_part(sources, settings, report):
        item = row.src_item
        report.num_kept += 1
        yield OpdRow(
            messages=item.chat,
            source=item.dataset,
            source_index=item.micro_index,
            final_answer=item.final_answer,
            grader=item.grader,
            metadata=item.metadata,
        )


def _sft_row(row: RolloutRow, index: int, prefix: str) -> SftRow:
    answer = {"role": "assistant", "content": with_opening(row.completion_texts[index], prefix)}
    return SftRow(
        messages=[*row.src_item.chat, answer], source=row.src_item.dataset, source_index=row.src_item.micro_index
    )


def _rows_of_part(
    sources: Sequence[str | Path], settings: SelectSettings, report: SelectReport
) -> Iterator[RolloutRow]:
    """The rows whose questions are of the report's part and may stay."""
    settings.validate()
    part_of = _split(sources, settings)
    places: dict[str, tuple[str, int]] = {}  # of each prompt: the question that it was first
    for source in sources:
        rows = read_rows(source, RolloutRow)
        for _, row in rows:
            report.num_rows += 1
            count = row.num_samples if report.part == "sft" else 1
            report.num_candidates += count
            prompt = digest_of(row.src_item.chat)
            part = part_of.get(prompt)
            reason = (
                None
                if part == report.part
                else "written while being read"
                if part is None
                else f"question is for {part.upper()}"
            )
            if reason is None and not settings.repeated and _is_repeated(row, prompt, places, report.part):
                reason = "repeated question"
            reason = reason or _accuracy_fault(row, settings)
            if reason is not None:
                report.drop(reason, count)
                continue
            yield row
        report.bad[str(source)] = rows.bad
        if not settings.skip_bad_rows:
            rows.check()


def _is_repeated(row: RolloutRow, prompt: str, places: dict[str, tuple[str, int]], part: Part) -> bool:
    """Whether the prompt came before: for SFT as another question, because another teacher's answers to the same one are new."""
    place = (row.src_item.dataset, row.src_item.micro_index)
    is_new = prompt not in places
    first = places.setdefault(prompt, place)
    return not is_new and (part == "opd" or place != first)


def _split(sources: Sequence[str | Path], settings: SelectSettings) -> dict[str, Part]:
    """The part of each question, by the digest of its prompt.

    By order, a dataset's boundary is where its settings file says that the questions end, so that a file that is not complete yet
    is split as the complete one will be. Without such a file, where one file mixes datasets, or where it has a choice of a dataset's
    questions, these are counted. Questions that belong together are for SFT where any of them is.
    """
    same = _Groups()
    lowest: dict[str, dict[str, int]] = {}  # of each dataset: its prompts, with their lowest index
    totals: dict[str, int] = {}
    for source in sources:
        found: dict[str, int] = {}  # of each dataset in this file: the highest index
        for _, row in read_rows(source, RolloutRow):
            item = row.src_item
            prompt = digest_of(item.chat)
            same.join(prompt, _problem(row))
            prompts = lowest.setdefault(item.dataset, {})
            prompts[prompt] = min(item.micro_index, prompts.get(prompt, item.micro_index))
            found[item.dataset] = max(item.micro_index, found.get(item.dataset, 0))
        planned = (read_meta(source) or {}).get("num_questions")
        if isinstance(planned, int) and len(found) == 1:
            (dataset,) = found
            if found[dataset] < planned:
                totals[dataset] = max(planned, totals.get(dataset, 0))
    early: set[str] = set()
    for dataset, prompts in lowest.items():
        groups: dict[str, int] = {}
        for prompt, index in prompts.items():
            group = same.find(prompt)
            groups[group] = min(index, groups.get(group, index))
        early |= {group for group, first in _early(groups, totals.get(dataset), settings).items() if first}
    return {prompt: "sft" if same.find(prompt) in early else "opd" for prompts in lowest.values() for prompt in prompts}


class _Groups:
    """What belongs together, directly or by way of others. A group is named by its least member, in whatever order it grew."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def find(self, member: str) -> str:
        """The name of a member's group."""
        path = []
        while (parent := self._parents.get(member, member)) != member:
            path.append(member)
            member = parent
        self._parents.update(dict.fromkeys(path, member))
        return member

    def join(self, *members: str | None) -> None:
        """Put members into one group."""
        names = sorted({self.find(member) for member in members if member is not None})
        self._parents.update(dict.fromkeys(names, names[0]))


def _early(groups: dict[str, int], total: int | None, settings: SelectSettings) -> dict[str, bool]:
    """Of each group of a dataset, whether it is in the first part. `total`: questions of the dataset, where that is known."""
    if settings.split_seed is not None:
        return {group: _fraction(settings.split_seed, group) < settings.sft_share for group in groups}
    if total is not None:
        return {group: index < round(settings.sft_share * total) for group, index in groups.items()}
    order = sorted(groups, key=lambda group: groups[group])
    return {group: rank < round(settings.sft_share * len(order)) for rank, group in enumerate(order)}


def _problem(row: RolloutRow) -> str | None:
    """What a problem is called however it is asked, in one language or another. Sorts before all digests of prompts."""
    problem = row.src_item.metadata.get("problem_id")
    return None if problem is None else f"!{digest_of([row.src_item.dataset, problem])}"


def _fraction(seed: int, group: str) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed}/{group}".encode()).digest()[:8]) / 2**64


def _accuracy_fault(row: RolloutRow, settings: SelectSettings) -> str | None:
    """Why the teacher's accuracy leaves a question out. Samples that could not be graded may be right or wrong."""
    least, most = settings.min_accuracy, settings.max_accuracy
    if least is None and most is None:
        return None
    if not row.accuracies:
        return "teacher's accuracy unknown"
    right = sum(value for value in row.accuracies if value is not None)
    low = right / row.num_samples
    high = (right + sum(value is None for value in row.accuracies)) / row.num_samples
    if least is not None and high < least:
        return "teacher's accuracy below min_accuracy"
    if most is not None and low > most:
        return "teacher's accuracy above max_accuracy"
    if (least is not None and low < least) or (most is not None and high > most):
        return "teacher's accuracy unknown"
    return None


def _sample_fault(row: RolloutRow, index: int, settings: SelectSettings) -> str | None:
    """Why a sample is left out."""
    if not row.completion_texts[index].strip():
        return "empty or failed"
    if not settings.unfinished:
        if not row.finished:
            return "not known whether finished"
        if not row.finished[index]:
            return "not finished"
    if not settings.incorrect:
        accuracy = row.accuracies[index] if row.accuracies else None
        if accuracy is None:
            return "not graded"
        if accuracy < 1:
            return "wrong"
    if (settings.min_tokens or settings.max_tokens) and not row.n_tokens:
        return "length not known"
    if settings.min_tokens is not None and row.n_tokens[index] < settings.min_tokens:
        return "shorter than min_tokens"
    if settings.max_tokens is not None and row.n_tokens[index] > settings.max_tokens:
        return "longer than max_tokens"
    return None


def _length(row: RolloutRow, index: int) -> int:
    if not row.n_tokens:
        raise DataError(
            f"question {row.question_idx} has no n_tokens, so its shortest completion is not known; keep all instead"
        )
    return row.n_tokens[index]
