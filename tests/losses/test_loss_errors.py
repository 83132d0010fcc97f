"""What the losses refuse, and how they say it."""

from __future__ import annotations

import pytest
import torch

from loss_cases import make_case
from pipo.errors import ConfigError
from pipo.losses import FullTeacher, divergence_loss
from pipo.losses.objective import Full, Sampled, TopK


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mode": "sideways"}, "full, topk, sampled.*'sideways'"),
        ({"beta": 1.5}, "beta must lie in.*1.5"),
        ({"mode": "sampled", "beta": 0.5}, "'sampled'.*0.5"),
        ({"mode": "topk", "k": 0}, "k must be at least 1, got 0"),
        ({"labels": torch.tensor([1, 50])}, "label 50 is outside the vocabulary of 50"),
        ({"labels": torch.tensor([1])}, r"hidden states must come in the shape \[1, 8\].*\[2, 8\]"),
        ({"teacher": FullTeacher(torch.zeros(2, 49))}, "share a vocabulary, got 49 entries and 50"),
        ({"teacher": FullTeacher(torch.zeros(3, 50))}, r"log-probabilities must come in the shape \[2\], got \[3\]"),
        ({"mode": "sampled", "ratios": torch.ones(3)}, r"ratios must come in the shape \[2\]"),
    ],
)
def test_errors_name_what_was_wrong(options, says):
    case = make_case(num=2, supervise=1.0)
    arguments = {"mode": "full", "labels": case.labels, "teacher": case.local, **options}
    with pytest.raises(ConfigError, match=says):
        divergence_loss(hidden=case.hidden, head=case.head, **arguments)


def test_objectives_are_plain_values():
    """Two configs that ask for the same are the same."""
    assert Full() == Full(1.0)
    assert TopK() == TopK(32, 1.0)
    assert Sampled() == Sampled()
