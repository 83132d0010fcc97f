"""A teacher of whom a server returned the best few tokens: what is exact, what is estimated, what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from loss_cases import make_case
from pipo.errors import ConfigError
from pipo.losses import ServedTeacher, divergence_loss
from pipo.losses.teacher import ServedTargets


def served(case, k, labels=True):
    log_probs = case.teacher_logits().log_softmax(-1)
    best = log_probs.topk(k)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(0))
    known = log_probs.gather(1, case.labels.clamp_min(0)[:, None])[:, 0] if labels else None
    return ServedTeacher(best.indices[:, order], best.values[:, order], known)


@pytest.mark.parametrize("mode", ["topk", "sampled"])
@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_exact_where_all_of_the_set_was_returned(mode, beta):
    """The whole vocabulary in any order is the teacher itself. Breaks when a token is looked up wrongly."""
    if mode == "sampled":
        beta = 1.0
    case = make_case(vocab=20)
    losses = [
        divergence_loss(mode, case.hidden, case.head, case.labels, teacher, k=4, beta=beta)
        for teacher in (served(case, 20, labels=False), case.local)
    ]
    for one, other in zip(*(torch.autograd.grad(x.mean, case.leaves) for x in losses), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(losses[0].confidence_target, losses[1].confidence_target)
    assert losses[0].positions.overlap.numel() == 0


def test_sampled_is_exact_at_known_labels():
    """One token returned, and the label's own log-probability."""
    case = make_case()
    one, other = (
        torch.autograd.grad(divergence_loss("sampled", case.hidden, case.head, case.labels, t).mean, case.leaves)
        for t in (served(case, 1), case.local)
    )
    for found, wanted in zip(one, other, strict=True):
        torch.testing.assert_close(found, wanted)


def test_estimates_share_what_is_left():
    """Tokens 5, 6, 7 were not returned; 0.08 is left, none may have more than the least returned, 0.02."""
    targets = ServedTargets(
        torch.tensor([[2, 3, 4, -1]]),
        torch.tensor([[0.7, 0.2, 0.02, 0.0]]).log(),
        torch.tensor([9]),
        torch.tensor([math.nan]),
    )
    asked = torch.ones(1, 4, dtype=torch.bool)
    found = targets.at(torch.tensor([[2, 5, 6, 7]]), asked).exp()
    torch.testing.assert_close(found, torch.tensor([[0.7, 0.02, 0.02, 0.02]]))
    wide = targets.at(torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]]), torch.ones(1, 8, dtype=torch.bool)).exp()
    torch.testing.assert_close(wide, torch.full((1, 8), 0.01))
    assert sorted(targets.top(3)[0].tolist()) == [2, 3, 4]
    assert targets.top(9).shape == (1, 4)


def test_labels_beside_the_best_tokens():
    """The label's own probability is used for it and for no other token; NaN says that it is not known."""
    targets = ServedTargets(
        torch.tensor([[2], [2]]),
        torch.tensor([[0.9], [0.9]]).log(),
        torch.tensor([9, 9]),
        torch.tensor([math.log(0.001), math.nan]),
    )
    found = targets.at(torch.tensor([[9, 8], [9, 8]]), torch.tensor([[True, False], [True, False]])).exp()
    torch.testing.assert_close(found, torch.tensor([[0.001, 0.1], [0.1, 0.1]]))


def test_probabilities_that_sum_above_one():
    """A server rounds. Breaks when the logarithm of what is left is taken of a negative number."""
    case = make_case(num=3, supervise=1.0)
    teacher = ServedTeacher(torch.tensor([[1, 2]] * 3), torch.tensor([[0.8, 0.2001]] * 3).log())
    loss = divergence_loss("topk", case.hidden, case.head, case.labels, teacher).mean
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, case.leaves))


def test_what_a_server_can_t_give_is_refused():
    case = make_case(num=3, supervise=1.0)
    ids, log_probs = torch.tensor([[1, 2]] * 3), torch.zeros(3, 2)
    for mode, teacher, says in (
        ("full", ServedTeacher(ids, log_probs), "'full' needs.*whole vocabulary.*ServedTeacher.*'topk'"),
        ("topk", ServedTeacher(ids + 48, log_probs), "served id 50.*vocabulary is 50"),
        ("topk", ServedTeacher(ids - 3, log_probs), "no token at 3 of 3 supervised positions"),
        ("topk", ServedTeacher(ids, log_probs[:, :1]), r"log-probabilities must come in the shape \[3, 2\]"),
        ("topk", ServedTeacher(ids[:2], log_probs[:2]), r"ids must come in the shape \[3\], got \[2\]"),
        ("topk", ServedTeacher(ids, log_probs, torch.zeros(2)), r"of labels must come in the shape \[3\]"),
    ):
        with pytest.raises(ConfigError, match=says):
            divergence_loss(mode, case.hidden, case.head, case.labels, teacher)
