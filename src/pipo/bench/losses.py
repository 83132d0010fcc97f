"""What the losses take of memory, by the number of positions: the pass over the head on random states, every byte counted.

Shape legend: N positions, H width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipo.losses import LocalTeacher, Mode, OutputMap, cross_entropy, divergence_loss
from pipo.model.shapes import shape_config
from pipo.training.ledger import MemoryLedger


@dataclass(frozen=True)
class LossCost:
    """The pass over one head, forward and backward.

    `peak_bytes`: at most, beyond what is as narrow as the hidden states: their copy and its gradients, before and after scaling.
    `logits_bytes`: what logits of all positions in float32 would take, of which a plain loss holds several copies.
    """

    num_positions: int
    peak_bytes: int
    logits_bytes: int
    seconds: float


def bench_losses(shape: str, positions: Sequence[int], mode: Mode | None = None) -> list[LossCost]:
    """The cost of cross-entropy, or of the divergence `mode` from a teacher of the same shape, at each number of positions."""
    config = shape_config(shape)
    generator = torch.Generator().manual_seed(0)
    head = OutputMap(torch.randn(config.vocab_size, config.hidden_size, generator=generator) * 0.02)
    return [_cost(head, num, mode, generator) for num in positions]


def _cost(head: OutputMap, num: int, mode: Mode | None, generator: torch.Generator) -> LossCost:
    size, width = head.weight.shape
    hidden_NH = torch.randn(num, width, generator=generator)
    labels_N = torch.randint(size, (num,), generator=generator)
    teacher = LocalTeacher(hidden_NH.flip(0), head)
    hidden_NH.requires_grad_()
    start = time.perf_counter()
    with MemoryLedger() as ledger:
        if mode is None:
            loss = cross_entropy(hidden_NH, head, labels_N).mean
        else:
            loss = divergence_loss(mode, hidden_NH, head, labels_N, teacher).mean
        loss.backward()  # type: ignore[no-untyped-call]
    seconds = time.perf_counter() - start
    narrow = 3 * hidden_NH.numel() * hidden_NH.element_size()
    return LossCost(num, ledger.peak_bytes - narrow, num * size * 4, seconds)
