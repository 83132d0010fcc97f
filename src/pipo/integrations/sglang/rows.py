"""What writing a pair needs to know of each request of a batch, on the device.

It rides on SGLang's `SamplingBatchInfo` as `pairs`, through the placeholders that SGLang keeps for such additions, so that it is filtered
and merged where the rest is. A batch is laid out anew from its requests whenever a prompt is read, also after a retraction; so what
the middle parts of a prompt draw, which is thrown away, is never counted.

Shape legend: R requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from pipo.integrations.sglang.hooks import Hook
from pipo.integrations.sglang.penalties import Penalties, PenaltySettings
from pipo.integrations.sglang.serving import served
from pipo.model.sampling_batch import to_device
from pipo.pairing import draws_drafts


class PairRows:
    """One row per request."""

    def __init__(self, thresholds: Sequence[float], penalties: Penalties) -> None:
        self.thresholds = list(thresholds)
        """τ of each, on the host."""
        self.penalties = penalties
        self._lay_out()

    @classmethod
    def of(cls, reqs: Sequence[Any], vocab_size: int, device: Any) -> PairRows:
        """Of the requests of a new batch."""
        settings, tokens = [PenaltySettings.of(req) for req in reqs], [req.pairs.tokens for req in reqs]
        return cls([req.pairs.threshold for req in reqs], Penalties(settings, tokens, vocab_size, device))

    @property
    def any_drafts(self) -> bool:
        """Whether any request's gate can commit a draft; known on the host."""
        return any(map(draws_drafts, self.thresholds))

    def for_forward(self) -> PairRows:
        """For a step in flight: the batch may change meanwhile, but counts are shared."""
        copied = copy(self)
        copied.penalties = copy(self.penalties)
        return copied

    def filter(self, keep: Sequence[int], keep_R: Tensor) -> None:
        """Keep some rows; `keep_R` is the same on the device."""
        self.thresholds = [self.thresholds[row] for row in keep]
        self.penalties.filter(keep, keep_R)
        self._lay_out()

    def merge(self, other: PairRows) -> None:
        """Add another batch's rows behind."""
        self.thresholds = self.thresholds + other.thresholds
        self.penalties.merge(other.penalties)
        self._lay_out()

    def _lay_out(self) -> None:
        thresholds_R = torch.tensor(self.thresholds, dtype=torch.float32)
        self.threshold_R = to_device(thresholds_R, self.penalties.device)
        """float32: τ."""


def after_new(_: None, info: Any, batch: Any, vocab_size: int) -> None:
    """A batch's sampling settings were gathered."""
    if served() is not None:
        info.pairs = PairRows.of(batch.reqs, vocab_size, info.device)


def after_filter(_: None, info: Any, keep_indices: list[int], keep_indices_device: Tensor) -> None:
    """Requests left a batch."""
    if served() is not None:
        info.pairs.filter(keep_indices, keep_indices_device)


def after_merge(_: None, info: Any, other: Any) -> None:
    """Two batches became one."""
    if served() is not None:
        info.pairs.merge(other.pairs)


def after_copy(copied: Any, info: Any) -> None:
    """Each step computes with a copy."""
    if served() is not None:
        copied.pairs = info.pairs.for_forward()


INFO = "sampling.sampling_batch_info.SamplingBatchInfo"
HOOKS = (
    Hook(f"{INFO}.adjusted_from_schedule_batch", "after", after_new, ("self", "batch", "vocab_size")),
    Hook(f"{INFO}.adjusted_filter_batch", "after", after_filter, ("self", "keep_indices", "keep_indices_device")),
    Hook(f"{INFO}.adjusted_merge_batch", "after", after_merge, ("self", "other")),
    Hook(f"{INFO}.copy_for_forward", "after", after_copy, ("self",)),
)
