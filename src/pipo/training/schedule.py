"""The learning rate over a run: a linear warm-up, then cosine, linear or constant."""

from __future__ import annotations

from math import ceil, cos, pi

from pipo.training.config import OptimizerSettings


def num_warmup_steps(optimizer: OptimizerSettings, num_steps: int) -> int:
    """Steps of the warm-up: its share of the run, rounded up, and never the whole of it."""
    return min(ceil(optimizer.warmup * num_steps), num_steps - 1)


def rate(step: int, num_steps: int, optimizer: OptimizerSettings) -> float:
    """Share of the full learning rate at a step, counted from 0.

    No step has a rate of 0: the first of a warm-up of n has 1 / (n + 1), and the curves come to 0 only where the run is over.
    """
    warmup = num_warmup_steps(optimizer, num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / (num_steps - warmup)
    if optimizer.schedule == "cosine":
        return 0.5 * (1 + cos(pi * done))
    return 1 - done if optimizer.schedule == "linear" else 1.0
