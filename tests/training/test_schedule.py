"""The learning rate over a run."""

import pytest

from pipo.training.config import OptimizerSettings
from pipo.training.schedule import num_warmup_steps, rate


def rates(num_steps, **settings):
    return [rate(step, num_steps, OptimizerSettings(**settings)) for step in range(num_steps)]


def test_curves():
    assert rates(4, schedule="constant", warmup=0) == [1, 1, 1, 1]
    assert rates(4, schedule="linear", warmup=0) == [1, 0.75, 0.5, 0.25]
    assert rates(4, schedule="cosine", warmup=0) == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert rates(6, schedule="linear", warmup=0.5) == pytest.approx([0.25, 0.5, 0.75, 1, 2 / 3, 1 / 3])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 100])
def test_no_step_is_wasted(schedule, num_steps):
    """A rate of 0 would spend a step, in distillation its rollouts too, on nothing."""
    found = rates(num_steps, schedule=schedule, warmup=0.05)
    assert min(found) > 0
    assert max(found) == 1.0


@pytest.mark.parametrize(
    ("num_steps", "warmup", "steps"), [(100, 0.05, 5), (101, 0.05, 6), (10, 0.0, 0), (1, 0.5, 0), (3, 0.99, 2)]
)
def test_length_of_the_warm_up(num_steps, warmup, steps):
    assert num_warmup_steps(OptimizerSettings(warmup=warmup), num_steps) == steps
