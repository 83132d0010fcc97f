"""Cross-entropy of a head over its own supervised positions, in chunks, never as `[L, V]` logits.

Shape legend: N supervised positions, C positions of a chunk, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipo.pairing import IGNORE_INDEX

CHUNK_POSITIONS = 1024

Head = Callable[[Tensor], Tensor]


class TokenLoss(NamedTuple):
    """`mean`: float32 scalar, zero (with a gradient of zero) where nothing is supervised. `label_probability`: `[N]`,
    detached, in the order of the supervised positions. `supervised`: boolean, the shape of the labels."""

    mean: Tensor
    label_probability: Tensor
    supervised: Tensor


def cross_entropy(hidden: Tensor, head: Head, labels: Tensor) -> TokenLoss:
    """Mean cross-entropy of `head(hidden)` against `labels` over the labels that are not −100.

    Args:
        hidden: `[..., H]`, any float dtype. head: `[C, H] → [C, V]` logits. labels: `[...]` int64.

    The softmax is taken in float32. Logits live for one chunk at a time, in the backward pass too.
    """
    supervised = labels != IGNORE_INDEX
    hidden_NH, labels_N = hidden[supervised], labels[supervised]
    total = hidden_NH.float().sum() * 0.0
    log_probs: list[Tensor] = []
    for hidden_CH, labels_C in zip(
        torch.split(hidden_NH, CHUNK_POSITIONS), torch.split(labels_N, CHUNK_POSITIONS), strict=True
    ):
        if labels_C.numel() == 0:
            continue
        losses_C = checkpoint(_chunk_losses, hidden_CH, labels_C, head, use_reentrant=False)
        total = total + losses_C.sum()
        log_probs.append(-losses_C.detach())
    probability = torch.cat(log_probs).exp() if log_probs else hidden_NH.new_zeros(0, dtype=torch.float32)
    return TokenLoss(total / max(labels_N.numel(), 1), probability, supervised)


def _chunk_losses(hidden_CH: Tensor, labels_C: Tensor, head: Head) -> Tensor:
    return F.cross_entropy(head(hidden_CH).float(), labels_C, reduction="none")
