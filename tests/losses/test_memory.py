"""What a pass keeps alive: a chunk's logits and the gradients, never `[L, V]`."""

from __future__ import annotations

import pytest

from loss_cases import make_case
from pipo.losses import chunked, cross_entropy, divergence_loss
from pipo.training.ledger import MemoryLedger

WIDTH, VOCAB, BUDGET = 8, 2000, 2**20


def peak_bytes(num: int, mode: str, train_head: bool) -> int:
    case = make_case(num=num, width=WIDTH, vocab=VOCAB, supervise=1.0, train_head=train_head)
    with MemoryLedger() as memory:
        if mode == "cross_entropy":
            loss = cross_entropy(case.hidden, case.head, case.labels).mean
        else:
            loss = divergence_loss(mode, case.hidden, case.head, case.labels, case.local, beta=beta_of(mode)).mean
        loss.backward()
    return memory.peak_bytes


def beta_of(mode: str) -> float:
    return 0.5 if mode == "full" else 1.0


@pytest.mark.parametrize("mode", ["cross_entropy", "full", "topk", "sampled"])
@pytest.mark.parametrize("train_head", [True, False])
def test_peak_memory_does_not_grow_with_the_vocabulary_times_the_length(mode, train_head, monkeypatch):
    """From 200 positions to 1600 only what is as long as the positions and narrow may grow: gathered hidden states, their
    gradient before and after scaling, and a few numbers of each. `[L, V]` would add 11 MiB."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES", BUDGET)
    small, large = (peak_bytes(num, mode, train_head) for num in (200, 1600))
    assert large - small <= 1400 * (4 * WIDTH * 4 + 16 * 8)
    of_head = 3 * VOCAB * WIDTH * 4 if train_head else 0
    assert small <= BUDGET + of_head + 200 * (4 * WIDTH * 4 + 16 * 8), "a chunk keeps more alive than its budget"


def test_the_measure_sees_whole_logits():
    """The counter would notice: plain logits of as many positions."""
    case = make_case(num=1600, width=WIDTH, vocab=VOCAB, supervise=1.0)
    with MemoryLedger() as memory:
        case.logits().log_softmax(-1).sum().backward()
    assert memory.peak_bytes > 2 * 1600 * VOCAB * 4
