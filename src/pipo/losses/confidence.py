"""Binary cross-entropy of the confidence head. Section 3.1, eq. 7.

Shape legend: N supervised positions.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def confidence_loss(confidence_logits_N: Tensor, target_N: Tensor, *, num_items: int | Tensor | None = None) -> Tensor:
    """Mean BCE of `sigmoid(confidence_logits)` against `target` in [0, 1], float32; zero where there are no positions.

    The target is detached and clamped: it says what the draft was worth, and learns nothing from the head. `num_items`: what the
    sum is divided by, as for :func:`pipo.losses.cross_entropy`.
    """
    logits, target = confidence_logits_N.float(), target_N.detach().float().clamp(0.0, 1.0)
    if target.numel() == 0:
        return logits.sum() * 0.0
    if num_items is None:
        return F.binary_cross_entropy_with_logits(logits, target)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / num_items
