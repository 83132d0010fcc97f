"""The same data split over any number of accumulation steps or ranks gives the same gradient."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loss_cases import Case, make_case
from pipo.losses import LocalTeacher, confidence_loss, cross_entropy, divergence_loss
from pipo.pairing import IGNORE_INDEX as IGN

NUM = 12


def loss_of(case: Case, mode: str, part: slice, num_items: int | torch.Tensor) -> torch.Tensor:
    """Of one part, all terms: the head's, and the gate's (a logit that is the hidden state's first entry)."""
    hidden, labels = case.hidden[part], case.labels[part]
    if mode == "cross_entropy":
        found = cross_entropy(hidden, case.head, labels, num_items=num_items)
        target = found.label_probability
    else:
        teacher = LocalTeacher(case.teacher_hidden[part], case.teacher_head)
        found = divergence_loss(mode, hidden, case.head, labels, teacher, k=4, num_items=num_items)
        target = found.confidence_target
    return found.mean + confidence_loss(hidden[found.supervised][:, 0], target, num_items=num_items)


@pytest.mark.parametrize("mode", ["cross_entropy", "full", "topk", "sampled"])
@settings(max_examples=10, deadline=None)
@given(
    cuts=st.lists(st.integers(0, NUM), max_size=5),
    num_ranks=st.integers(1, 3),
    supervise=st.sampled_from([0.2, 0.8]),
)
def test_any_split_gives_the_same_gradient(mode, cuts, num_ranks, supervise):
    """Parts of any size, some empty or without labels, dealt to ranks that average their gradients (so each scales its loss
    by their number). Breaks when a part's mean is taken over its own positions."""
    case = make_case(num=NUM, supervise=supervise, bias=True)
    num_items = torch.tensor(max(int((case.labels != IGN).sum()), 1))
    whole = torch.autograd.grad(loss_of(case, mode, slice(None), num_items), case.leaves)
    edges = [0, *sorted(cuts), NUM]
    ranks = [[torch.zeros_like(leaf) for leaf in case.leaves] for _ in range(num_ranks)]
    for index, (start, stop) in enumerate(pairwise(edges)):
        loss = loss_of(case, mode, slice(start, stop), num_items) * num_ranks
        for total, part in zip(ranks[index % num_ranks], torch.autograd.grad(loss, case.leaves), strict=True):
            total += part
    for wanted, *found in zip(whole, *ranks, strict=True):
        torch.testing.assert_close(torch.stack(found).mean(0), wanted, rtol=1e-4, atol=1e-6)


def test_the_default_is_the_mean_and_one_is_the_sum():
    case = make_case(num=NUM)
    number = int((case.labels != IGN).sum())
    mean = cross_entropy(case.hidden, case.head, case.labels).mean
    total = cross_entropy(case.hidden, case.head, case.labels, num_items=1).mean
    torch.testing.assert_close(total, mean * number)
