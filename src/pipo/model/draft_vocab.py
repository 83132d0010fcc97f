"""The draft vocabulary: the part of the vocabulary that drafts are drawn from, so that the second head has fewer rows to read.

Token 1 is never limited. Why so: docs/decisions/011-draft-vocabulary.md.

Shape legend: B rows, H width, V vocabulary, N ids of the draft vocabulary, M its places: N, or N + 1 with "elsewhere".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipo.errors import CheckpointError, ConfigError, UnsupportedModelError
from pipo.model.drafter import Drafter
from pipo.model.files import read_json, write_text

DRAFT_VOCAB = "draft_vocab.json"
"""The file beside a checkpoint's weights."""
NO_DRAFT = -1
"""Stands where no token was drafted."""


@dataclass(frozen=True)
class DraftIds:
    """Which ids may be drafted, and how the rest of the vocabulary is told of.

    Raises:
        ConfigError: ids that are not sorted, repeat, or are not in the vocabulary; an `elsewhere` that is no row of numbers.
    """

    ids: tuple[int, ...]
    """Ascending."""
    vocab_size: int
    """V of the model that they are for."""
    elsewhere: tuple[float, ...] | None = None
    """A row for the head and an offset, `[H + 1]`: a logit that is about that of all other ids together (log-sum-exp). Where it is drawn
    there is no draft."""
    about: dict[str, Any] = field(default_factory=dict, compare=False)
    """Where they come from, as plain JSON."""

    def __post_init__(self) -> None:
        ids = self.ids
        if not ids or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise ConfigError("a draft vocabulary is a list of token ids with one id at least")
        if ids[0] < 0 or ids[-1] >= self.vocab_size or any(a >= b for a, b in pairwise(ids)):
            raise ConfigError(
                f"the ids of a draft vocabulary must ascend without repeats within 0 … {self.vocab_size - 1}, the model's "
                f"vocabulary; got {len(ids)} from {ids[0]} to {ids[-1]}"
            )
        if self.elsewhere is not None and not all(map(isfinite, self.elsewhere)):
            raise ConfigError("the row for elsewhere of a draft vocabulary must be finite numbers")

    @property
    def is_prefix(self) -> bool:
        """Whether these are the first ids of the vocabulary."""
        return self.ids[-1] == len(self.ids) - 1

    @property
    def digest(self) -> str:
        """A name for all that decides which drafts are drawn."""
        return hashlib.sha256(json.dumps([self.ids, self.elsewhere]).encode()).hexdigest()


def first_ids(number: int, vocab_size: int) -> DraftIds:
    """The first `number` ids: for measuring speed, where it matters how many there are and not which.

    Raises:
        ConfigError: there are not so many.
    """
    if not 1 <= number <= vocab_size:
        raise ConfigError(f"a draft vocabulary has 1 to {vocab_size} ids (the model's vocabulary), got {number}")
    return DraftIds(tuple(range(number)), vocab_size)


def read_draft_ids(path: Path) -> DraftIds:
    """What :func:`write_draft_ids` wrote.

    Raises:
        CheckpointError: it can't be read, or does not hold a draft vocabulary.
    """
    content = read_json(path)
    try:
        row = content.get("elsewhere")
        elsewhere = None if row is None else tuple(float(value) for value in row)
        return DraftIds(tuple(content["ids"]), int(content["vocab_size"]), elsewhere, dict(content.get("about") or {}))
    except KeyError as error:
        raise CheckpointError(f"{path} is no draft vocabulary: it has no {error.args[0]!r}") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is no draft vocabulary: {error}") from error


def write_draft_ids(path: Path, found: DraftIds) -> None:
    """Write a draft vocabulary as JSON, whole or not at all."""
    content = {"about": found.about, "vocab_size": found.vocab_size, "ids": found.ids, "elsewhere": found.elsewhere}
    write_text(path, json.dumps({name: value for name, value in content.items() if value is not None}) + "\n")


class DraftVocab:
    """The second head over a draft vocabulary: the head's rows of these ids, and where asked for the row for elsewhere.

    Its logits are over *places*; place `n` is token `token_M[n]`. These ascend, so that a draw from the same distribution is the same
    token as over the whole vocabulary. The first ids of a vocabulary are a view of the head, others a copy: see :meth:`refresh`.

    Args:
        model: whose head it is. chosen: the ids.
        with_elsewhere: use the row for elsewhere where there is one. Verified drafts need none.

    Raises:
        ConfigError: they are for another vocabulary or width. UnsupportedModelError: the head is not a plain linear layer.
    """

    def __init__(self, model: Drafter, chosen: DraftIds, *, with_elsewhere: bool) -> None:
        source = model.lm_head
        if not isinstance(source, nn.Linear) or type(source).forward is not nn.Linear.forward:
            raise UnsupportedModelError(
                f"a draft vocabulary needs a plain linear head, and this model's is a {type(source).__name__}: merge the adapter "
                "first, or use no draft vocabulary"
            )
        vocab_size, width = source.weight.shape
        if chosen.vocab_size != vocab_size:
            raise ConfigError(
                f"this draft vocabulary is of a model with {chosen.vocab_size} ids, and this model has {vocab_size}: make one for it "
                "with `pipo draft-vocab`"
            )
        elsewhere = chosen.elsewhere if with_elsewhere else None
        if elsewhere is not None and len(elsewhere) != width + 1:
            raise ConfigError(
                f"this draft vocabulary was fitted to a model of width {len(elsewhere) - 1}, and this model's is {width}: make one for it "
                "with `pipo draft-vocab`"
            )
        self.size = len(chosen.ids)
        self.has_elsewhere = elsewhere is not None
        self.place_of = {token: place for place, token in enumerate(chosen.ids)}
        """Place of each id."""
        device = source.weight.device
        self.ids_N = torch.tensor(chosen.ids, dtype=torch.int64, device=device)
        self.token_M = torch.cat([self.ids_N, self.ids_N.new_full((int(self.has_elsewhere),), NO_DRAFT)])
        """The token of each place; `NO_DRAFT` is elsewhere."""
        self._backbone, self._source = model.backbone, source
        self._offset = 0.0 if elsewhere is None else elsewhere[-1]
        self._is_view = chosen.is_prefix and elsewhere is None
        self.head = self._build(source, elsewhere)

    @property
    def num_places(self) -> int:
        """M."""
        return len(self.token_M)

    @torch.no_grad()
    def _build(self, source: nn.Linear, elsewhere: Sequence[float] | None) -> nn.Linear:
        weight, bias = source.weight, source.bias
        places = self.num_places
        head = nn.Linear(weight.shape[1], places, bias=bias is not None, device="meta", dtype=weight.dtype)
        if self._is_view:
            head.weight = nn.Parameter(weight[:places], requires_grad=False)
            if bias is not None:
                head.bias = nn.Parameter(bias[:places], requires_grad=False)
            return head
        head = head.to_empty(device=weight.device).requires_grad_(False)
        if elsewhere is not None:
            head.weight[self.size :] = torch.tensor(elsewhere[:-1], dtype=weight.dtype, device=weight.device)
            if bias is not None:
                head.bias[self.size :] = 0
        self._copy_rows(head)
        return head

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the head's rows over again, in place, after the model's weights have changed. The row for elsewhere stays."""
        if not self._is_view:
            self._copy_rows(self.head)

    def _copy_rows(self, head: nn.Linear) -> None:
        head.weight[: self.size] = self._source.weight[self.ids_N]
        if head.bias is not None:
            head.bias[: self.size] = self._source.bias[self.ids_N]

    def logits(self, hidden_BH: Tensor) -> Tensor:
        """`[B, H] → [B, M]`: logits to draw a place from, float32, as :meth:`pipo.model.drafter.Drafter.sampling_logits` makes them."""
        logits_BM = self._backbone.sampling_logits(self.head, hidden_BH)
        if self.has_elsewhere:
            logits_BM[:, self.size] += self._offset
        return logits_BM

    def allowed(self, allowed_V: Tensor) -> Tensor:
        """`[V] → [M]`: places that a grammar allows, given the ids that it does. Elsewhere: where it allows an id that has no place."""
        allowed_N = allowed_V[self.ids_N.to(allowed_V.device)]
        if not self.has_elsewhere:
            return allowed_N
        return torch.cat([allowed_N, (allowed_V.sum() > allowed_N.sum())[None]])

    def spread(self, values_BM: Tensor, vocab_size: int) -> Tensor:
        """`[B, M] → [B, V]`: what stands at each place at its token, 0 at the others. Not for elsewhere, which is no token."""
        assert not self.has_elsewhere
        return values_BM.new_zeros(len(values_BM), vocab_size).index_copy_(1, self.ids_N, values_BM)
