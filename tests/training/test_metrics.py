"""What a report says, against the same figures computed plainly."""

import math

import pytest
import torch

from pipo.losses.pair import NumItems
from pipo.model.modeling import PipoOutput
from pipo.training.metrics import Meter


def output(confidence, target):
    losses = {name: torch.tensor(value) for name, value in (("loss", 1.5), ("backbone_loss", 0.5), ("mtp_loss", 0.75))}
    confidence, target = torch.tensor(confidence), torch.tensor(target)
    return PipoOutput(**losses, confidence_loss=torch.tensor(0.25), confidence=confidence, confidence_target=target)


def test_calibration_is_weighted_over_bins_of_equal_width():
    """Two bins: |0.12 + 0.18 − (0.1 + 0.5)| and |0.96 + 1 + 0.97 − (0.9 + 1 + 0.2)| of five drafts; 1 falls in the last bin."""
    meter = Meter()
    meter.add_step(NumItems(4, 5))
    meter.add(output([0.12, 0.96, 1.0], [0.1, 0.9, 1.0]), torch.tensor(6))
    meter.add(output([0.18, 0.97], [0.5, 0.2]), torch.tensor(4))
    row = meter.row()
    assert row["confidence_ece"] == pytest.approx((abs(0.30 - 0.6) + abs(2.93 - 2.1)) / 5)
    assert row["confidence_mean"] == pytest.approx(3.23 / 5)
    assert row["confidence_target"] == pytest.approx(2.7 / 5)
    assert (row["commit_rate@0.95"], row["tokens_per_step@0.95"]) == (0.6, 1.6)
    assert row["commit_rate@0.98"] == 0.2
    assert (row["num_tokens"], row["num_slots"]) == (9, 10)
    assert (row["loss"], row["mtp_loss"]) == (3.0, 1.5)  # of one step, whose micro-batches gave shares
    assert meter.row()["num_slots"] == 0, "a report starts the next"


def test_ranks_add_up_before_anything_is_divided():
    """A rank with few drafts counts for few; the mean of the ranks' rates would be 0.5."""
    meters = Meter(), Meter()
    meters[0].add_step(NumItems(4, 5))
    meters[0].add(output([0.99], [1.0]), torch.tensor(2))
    meters[1].add(output([0.1] * 3, [0.0] * 3), torch.tensor(8))
    row = meters[0].row(lambda sums: sums + meters[1].sums)
    assert row["commit_rate@0.5"] == 0.25
    assert row["num_slots"] == 10
    assert row["loss"] == 3.0


def test_what_has_no_value_is_nan():
    meter = Meter()
    meter.add_step(NumItems(1, 1))
    meter.add(output([], []), torch.tensor(2))
    row = meter.row()
    assert all(
        math.isnan(row[name])
        for name in ("confidence_ece", "confidence_mean", "commit_rate@0.9", "tokens_per_step@0.9")
    )
    assert row["loss"] == 1.5
