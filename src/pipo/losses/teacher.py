"""What a teacher says about the student's positions, in the three forms in which it may be at hand. No gradient reaches it.

- :class:`LocalTeacher`: its hidden states and its head. Logits live for one chunk, as the student's do. Every mode is exact.
- :class:`FullTeacher`: log-probabilities of the whole vocabulary. Every mode is exact; for small cases.
- :class:`ServedTeacher`: the best few tokens of each position, as a server returns them.

Shape legend: M teacher positions, C positions of a chunk, H width, V vocabulary, K asked entries, k known entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pipo.errors import ConfigError
from pipo.losses.head import OutputMap

ABSENT = -1
"""The id of an empty place among a served teacher's tokens."""


class Targets(Protocol):
    """A teacher's probabilities at the positions of a chunk."""

    @property
    def log_probs_CV(self) -> Tensor | None:
        """Over the whole vocabulary, or None where the teacher does not give them."""
        ...

    def top(self, k: int) -> Tensor:
        """Ids of the `k` best tokens `[C, ≤k]`, :data:`ABSENT` in empty places."""
        ...

    def at(self, ids_CK: Tensor, asked_CK: Tensor) -> Tensor:
        """Full-vocabulary log-probabilities `[C, K]` of tokens; where not `asked`, any number."""
        ...


class Teacher(Protocol):
    """Gives the targets of any positions. Positions are counted over the flattened shape of the student's labels."""

    @property
    def knows_all(self) -> bool:
        """Whether the targets cover the whole vocabulary."""
        ...

    def check(self, supervised: Tensor, vocab_size: int) -> None:
        """Raise `ConfigError` where this teacher does not fit the shape of the labels, or the student's vocabulary."""
        ...

    def targets(self, positions_C: Tensor, labels_C: Tensor, dtype: torch.dtype) -> Targets:
        """The targets at these positions, in the dtype of the student's log-probabilities."""
        ...


@dataclass(frozen=True)
class DenseTargets:
    """Log-probabilities of the whole vocabulary."""

    log_probs_CV: Tensor

    def top(self, k: int) -> Tensor:
        """See :class:`Targets`."""
        return self.log_probs_CV.topk(k).indices

    def at(self, ids_CK: Tensor, asked_CK: Tensor) -> Tensor:
        """See :class:`Targets`."""
        return self.log_probs_CV.gather(1, ids_CK)


@dataclass(frozen=True)
class LocalTeacher:
    """Hidden states of a teacher that runs here, `[..., H]` with any leading shape, and its head.

    `positions`, in the shape of the student's labels, says which state, counted over the flattened leading shape, each of
    the student's positions is compared with (`pipo.pairing.teacher_positions_of_steps` gives them for one row). Without it
    states and labels have the same shape.
    """

    hidden: Tensor
    head: OutputMap
    positions: Tensor | None = None

    @property
    def knows_all(self) -> bool:
        """Always."""
        return True

    def check(self, supervised: Tensor, vocab_size: int) -> None:
        """See :class:`Teacher`."""
        _check_vocabulary(self.head.vocab_size, vocab_size)
        if self.positions is None:
            _check_shape("the teacher's hidden states", self.hidden.shape[:-1], supervised.shape)
        else:
            _check_shape("the teacher's positions", self.positions.shape, supervised.shape)

    def targets(self, positions_C: Tensor, labels_C: Tensor, dtype: torch.dtype) -> DenseTargets:
        """See :class:`Teacher`."""
        states_C = positions_C if self.positions is None else self.positions.reshape(-1)[positions_C]
        hidden_CH = self.hidden.detach().reshape(-1, self.hidden.shape[-1])[states_C]
        return DenseTargets(F.log_softmax(self.head.logits(hidden_CH).to(dtype), dim=-1))


@dataclass(frozen=True)
class FullTeacher:
    """Log-probabilities, or logits, `[..., V]` in the leading shape of the student's labels. Large: for small vocabularies."""

    log_probs: Tensor

    @property
    def knows_all(self) -> bool:
        """Always."""
        return True

    def check(self, supervised: Tensor, vocab_size: int) -> None:
        """See :class:`Teacher`."""
        _check_vocabulary(self.log_probs.shape[-1], vocab_size)
        _check_shape("the teacher's log-probabilities", self.log_probs.shape[:-1], supervised.shape)

    def targets(self, positions_C: Tensor, labels_C: Tensor, dtype: torch.dtype) -> DenseTargets:
        """See :class:`Teacher`."""
        rows_CV = self.log_probs.detach().reshape(-1, self.log_probs.shape[-1])[positions_C]
        return DenseTargets(F.log_softmax(rows_CV.to(dtype), dim=-1))


@dataclass(frozen=True)
class ServedTeacher:
    """The best tokens of each position: `ids [..., k]` with their full-vocabulary `log_probs [..., k]`, in any order.

    Places that the server left empty hold id −1; each supervised position has at least one token. `label_log_probs [...]`:
    of the student's labels, NaN where the server did not say (a rejected draft is no part of the text that it scored).

    Exact: the probability of every token that was returned. So `topk` is exact wherever the student's best and the label
    were returned too, `sampled` at known labels. Estimated: the other tokens of a position's set share evenly what the
    returned ones leave of 1, none above the least returned. For one token alone, a label, that is an upper bound: the
    pull away from it is too weak rather than too strong, and the confidence target of such a draft too high rather than
    too low, by less than the least returned probability over the student's. Where fewer tokens were returned than `topk`
    asks for, the set holds those. `full` and `Σ min(p_s, p_t)` can't be had.
    """

    ids: Tensor
    log_probs: Tensor
    label_log_probs: Tensor | None = None

    @property
    def knows_all(self) -> bool:
        """Never."""
        return False

    def check(self, supervised: Tensor, vocab_size: int) -> None:
        """See :class:`Teacher`."""
        _check_shape("the served ids", self.ids.shape[:-1], supervised.shape)
        _check_shape("the served log-probabilities", self.log_probs.shape, self.ids.shape)
        if self.label_log_probs is not None:
            _check_shape("the served log-probabilities of labels", self.label_log_probs.shape, supervised.shape)
        if self.ids.numel() and int(self.ids.max()) >= vocab_size:
            raise ConfigError(f"the teacher served id {int(self.ids.max())}, the student's vocabulary is {vocab_size}")
        num_empty = int((supervised & ~(self.ids >= 0).any(-1)).sum())
        if num_empty:
            raise ConfigError(
                f"the teacher served no token at {num_empty} of {int(supervised.sum())} supervised positions: "
                "leave them out (label −100) or ask the server again"
            )

    def targets(self, positions_C: Tensor, labels_C: Tensor, dtype: torch.dtype) -> ServedTargets:
        """See :class:`Teacher`."""
        num_known = self.ids.shape[-1]
        ids_Ck = self.ids.reshape(-1, num_known)[positions_C]
        known_Ck = self.log_probs.detach().reshape(-1, num_known)[positions_C].to(dtype)
        if self.label_log_probs is None:
            label_C = known_Ck.new_full(labels_C.shape, torch.nan)
        else:
            label_C = self.label_log_probs.detach().reshape(-1)[positions_C].to(dtype)
        return ServedTargets(ids_Ck, known_Ck.masked_fill(ids_Ck < 0, -torch.inf), labels_C, label_C)


@dataclass(frozen=True)
class ServedTargets:
    """See :class:`ServedTeacher`."""

    ids_Ck: Tensor
    known_Ck: Tensor
    labels_C: Tensor
    label_C: Tensor

    @property
    def log_probs_CV(self) -> None:
        """A server does not give them."""
        return None

    def top(self, k: int) -> Tensor:
        """See :class:`Targets`."""
        best_CK = self.known_Ck.topk(min(k, self.ids_Ck.shape[-1])).indices
        return self.ids_Ck.gather(1, best_CK)

    def at(self, ids_CK: Tensor, asked_CK: Tensor) -> Tensor:
        """See :class:`Targets`; an estimate where the token was not returned."""
        label_ids_C = self.labels_C.masked_fill(self.label_C.isnan(), ABSENT)
        ids_Ck = torch.cat([self.ids_Ck, label_ids_C[:, None]], dim=1)
        known_Ck = torch.cat([self.known_Ck, self.label_C[:, None]], dim=1)
        same_CKk = ids_CK[:, :, None] == ids_Ck[:, None, :]
        returned_CK = same_CKk.any(-1)
        num_others_C = (asked_CK & ~returned_CK).sum(-1).clamp_min(1)
        # Below float32's precision, what the returned ones leave of 1 says nothing.
        left_C = (1.0 - self.known_Ck.exp().sum(-1)).clamp_min(torch.finfo(torch.float32).eps)
        least_C = self.known_Ck.masked_fill(self.ids_Ck < 0, torch.inf).amin(-1)
        estimate_C = torch.minimum((left_C / num_others_C).log(), least_C)
        found_CK = known_Ck.gather(1, same_CKk.int().argmax(-1))
        return torch.where(returned_CK, found_CK, estimate_C[:, None])


def _check_vocabulary(teacher: int, student: int) -> None:
    if teacher != student:
        raise ConfigError(
            f"teacher and student must share a vocabulary, got {teacher} entries and {student}: "
            "cut or resize the head of one to the entries that both have"
        )


def _check_shape(what: str, found: torch.Size, expected: torch.Size) -> None:
    if found != expected:
        raise ConfigError(f"{what} must come in the shape {list(expected)}, got {list(found)}")
