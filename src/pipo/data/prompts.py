"""Prompts to roll out: what on-policy distillation asks the student. Section 3.2."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from torch.utils.data import Dataset

from pipo.data.conversation import encode_rendered, render_chat
from pipo.data.drop_report import DropReport
from pipo.data.records import BadRow, OpdRow, read_rows
from pipo.errors import DataError, RequestError


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the student is asked.

    `index`: its place among the prompts, which with the step decides the draw. `token_ids`: as serving would read the chat.
    `row`: by which a completion can be checked. `has_loss`: off where it only fills a batch, and is answered for nothing.
    """

    index: int
    token_ids: list[int]
    row: OpdRow | None = None
    has_loss: bool = True

    def without_loss(self) -> Prompt:
        """The same prompt, to fill a batch."""
        return replace(self, has_loss=False)


class PromptDataset(Dataset[Prompt]):
    """The prompts that are used, in the order of their rows."""

    def __init__(self, prompts: list[Prompt], report: DropReport) -> None:
        self._prompts = prompts
        self.report = report
        self.lengths = [len(prompt.token_ids) for prompt in prompts]
        """Tokens of each prompt."""
        self.fingerprint = hashlib.sha256(json.dumps([prompt.token_ids for prompt in prompts]).encode()).hexdigest()[
            :16
        ]
        """Of the prompts' tokens, in their order."""

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Prompt:
        """Prompt `index`."""
        return self._prompts[index]


def build_prompt_dataset(
    source: str | Path,
    tokenizer: Any,
    *,
    max_prompt_tokens: int,
    template_options: Mapping[str, Any],
    num_examples: int | None = None,
    split: str = "train",
    subset: str | None = None,
) -> PromptDataset:
    """The prompts of a file of OPD rows, or a dataset of them.

    Args:
        source, split, subset: as :func:`pipo.data.records.read_rows` takes them.
        tokenizer: with a chat template.
        max_prompt_tokens: longer prompts are left out, and counted.
        num_examples: rows to use, from the first.

    Raises:
        DataError: no rows, no template, or no prompt that can be used.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("conversations need a tokenizer with a chat template, and this model has none")
    rows = read_rows(source, OpdRow, split=split, subset=subset)
    report = DropReport(str(source))
    kept: list[tuple[int, OpdRow, str]] = []
    for line, row in islice(rows, num_examples):
        try:
            kept.append((line, row, render_chat(tokenizer, row.messages, **template_options)))
        except (TemplateError, TypeError, RequestError) as error:
            report.bad.append(BadRow(line, f"the chat template refuses this conversation: {error}"))
    prompts: list[Prompt] = []
    for (line, row, _), ids in zip(kept, encode_rendered(tokenizer, [text for *_, text in kept]), strict=True):
        if len(ids) > max_prompt_tokens:
            report.too_long.append(line)
        else:
            prompts.append(Prompt(len(prompts), ids, row))
    report.num_rows = rows.num_read
    report.num_used = report.num_examples = len(prompts)
    report.num_too_long = len(report.too_long)
    report.bad = sorted([*rows.bad, *report.bad], key=lambda bad: bad.line)
    return PromptDataset(prompts, report.check())
