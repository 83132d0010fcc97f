"""A given share of drafts that stand, whatever the weights say: random ones would keep none, and a benchmark asks what a rate is worth.

The work of judging is done all the same. Nothing here looks at the device, so it may run inside a captured graph.

Shape legend: B rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipo.engine.baselines import SpeculativeRunner
from pipo.errors import ConfigError
from pipo.model.modeling import PipoForCausalLM
from pipo.model.sampling import Verdict

MAX_ROWS = 4096
ALWAYS, NEVER = 0.0, 2.0
"""Thresholds at which the gate keeps every draft, and none."""


class GivenShare:
    """For each row, True in a share `rate` of the calls, off by less than one call however many there are.

    Rows start at random points of their cycle: at one call, each is True with probability `rate`, whatever the others are.
    """

    def __init__(self, rate: float, device: torch.device, seed: int = 0) -> None:
        """Raises `ConfigError` for a rate outside [0, 1]."""
        check_rate(rate)
        self.rate = rate
        generator = torch.Generator().manual_seed(seed)
        self._sums = torch.rand(MAX_ROWS, dtype=torch.float64, generator=generator).to(device)

    def draw(self, num_rows: int) -> Tensor:
        """bool `[B]`."""
        sums_B = self._sums[:num_rows]
        before_B = sums_B.floor()
        sums_B += self.rate
        return sums_B.floor() > before_B


def check_rate(rate: float, name: str = "commit") -> None:
    """Raise `ConfigError` for a share outside [0, 1]."""
    if not 0.0 <= rate <= 1.0:
        raise ConfigError(f"{name} is a share of drafts, from 0 to 1, got {rate}")


def steer_gate(model: PipoForCausalLM, commit: float, seed: int = 0) -> float:
    """Let a model's gate commit a share `commit` of the drafts; the threshold to ask for with it."""
    check_rate(commit)
    if commit in (0.0, 1.0):
        return NEVER if commit == 0.0 else ALWAYS
    share, judge = GivenShare(commit, model.device, seed), model.confidence

    def confidence(hidden_BLH: Tensor, mtp_hidden_BLH: Tensor, features_BL3: Tensor | None = None) -> Tensor:
        judged_B = judge(hidden_BLH, mtp_hidden_BLH, features_BL3)
        return torch.where(share.draw(len(judged_B)), judged_B.clamp_min(1.0), judged_B.clamp_max(0.0))

    model.confidence = confidence  # type: ignore[method-assign]
    return 0.5


def steer_verification(runner: SpeculativeRunner, acceptance: float, seed: int = 0) -> None:
    """Let speculative decoding accept a share `acceptance` of the drafts."""
    check_rate(acceptance, "acceptance")
    share = GivenShare(acceptance, runner.model.device, seed)
    verify: Callable[..., Verdict] = runner.verify

    def verdict(*args: Any) -> Verdict:
        judged = verify(*args)
        return judged._replace(accepted_B=share.draw(len(judged.accepted_B)))

    runner.verify = verdict
