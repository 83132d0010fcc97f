"""What writing a pair needs to know of each request of a batch, on the device.

It rides on SGLang's `SamplingBatchInfo` as `pairs`, through the placeholders that SGLang keeps for such additions, so that it is filtered
and merged where the rest is.

Shape legend: R requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipo.integrations.sglang.hooks import Hook
from pipo.integrations.sglang.serving import served


@dataclass
class PairRows:
    """One row per request."""

    threshold_R: Tensor
    """float32: τ."""

    @classmethod
    def of(cls, reqs: Sequence[Any], device: Any) -> PairRows:
        """Of the requests of a new batch."""
        return cls(torch.tensor([req.pairs.threshold for req in reqs], dtype=torch.float32).to(device))

    def filter(self, keep_R: Tensor) -> None:
        """Keep some rows."""
        self.threshold_R = self.threshold_R[keep_R]

    def merge(self, other: PairRows) -> None:
        """Add another batch's rows behind."""
        self.threshold_R = torch.cat([self.threshold_R, other.threshold_R])


def after_new(_: None, info: Any, batch: Any, vocab_size: int) -> None:
    """A batch's sampling settings were gathered."""
    if served() is not None:
        info.pairs = PairRows.of(batch.reqs, info.device)


def after_filter(_: None, info: Any, keep_indices: list[int], keep_indices_device: Tensor) -> None:
    """Requests left a batch."""
    if served() is not None:
        info.pairs.filter(keep_indices_device)


def after_merge(_: None, info: Any, other: Any) -> None:
    """Two batches became one."""
    if served() is not None:
        info.pairs.merge(other.pairs)


def after_copy(copied: Any, info: Any) -> None:
    """Overlap scheduling computes with a copy."""
    if served() is not None:
        copied.pairs = info.pairs


INFO = "sampling.sampling_batch_info.SamplingBatchInfo"
HOOKS = (
    Hook(f"{INFO}.adjusted_from_schedule_batch", "after", after_new, ("self", "batch", "vocab_size")),
    Hook(f"{INFO}.adjusted_filter_batch", "after", after_filter, ("self", "keep_indices", "keep_indices_device")),
    Hook(f"{INFO}.adjusted_merge_batch", "after", after_merge, ("self", "other")),
    Hook(f"{INFO}.copy_for_forward", "after", after_copy, ("self",)),
)
