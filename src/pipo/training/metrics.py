"""What a run reports about its steps: losses, what the gate says against what it should say, and how much was read.

Everything is kept as sums on the device, so that micro-batches, steps and ranks add up, and nothing waits for the device between
two reports.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipo.losses.pair import NumItems
from pipo.model.modeling import PipoOutput
from pipo.pairing import accept

THRESHOLDS = (0.5, 0.8, 0.9, 0.95, 0.98)
"""Values of τ at which the commit rate is reported."""
NUM_BINS = 10
LOSSES = ("loss", "backbone_loss", "mtp_loss", "confidence_loss")
COUNTS = ("num_steps", "num_tokens1", "num_tokens2", "num_slots", "num_judged")
FIELDS = (
    *LOSSES,
    *COUNTS,
    *(f"committed@{tau}" for tau in THRESHOLDS),
    *(f"{what}_{i}" for what in ("bin_count", "bin_confidence", "bin_target") for i in range(NUM_BINS)),
)


class Meter:
    """Sums over the steps since the last report, of this process."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(len(FIELDS), dtype=torch.float64, device=device)

    def add_step(self, num_items: NumItems) -> None:
        """Count an optimiser step; its positions are those of all ranks, so one process only adds them."""
        self._add(COUNTS[0], torch.stack([torch.as_tensor(n, device=self.sums.device) for n in (1, *num_items)]))

    def add(self, output: PipoOutput, num_slots: Tensor) -> None:
        """Add a forward's losses, which are shares of the whole step's, and what its gate said. `num_slots`: slots it read."""
        losses = (output.loss, output.backbone_loss, output.mtp_loss, output.confidence_loss)
        self._add("loss", torch.stack([loss.detach() for loss in losses if loss is not None]))
        confidence_N, target_N = output.confidence, output.confidence_target
        assert confidence_N is not None
        assert target_N is not None
        confidence_N, target_N = confidence_N.detach().double(), target_N.detach().double()
        bins_N = (confidence_N * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        binned = torch.zeros(3, NUM_BINS, dtype=torch.float64, device=confidence_N.device)
        for row, values_N in zip(binned, (torch.ones_like(confidence_N), confidence_N, target_N), strict=True):
            row.index_add_(0, bins_N, values_N)
        committed = torch.stack([accept(confidence_N, tau).sum() for tau in THRESHOLDS])
        self._add("num_slots", torch.stack([num_slots, binned[0].sum().to(num_slots.dtype)]))
        self._add(f"committed@{THRESHOLDS[0]}", committed)
        self._add("bin_count_0", binned.flatten())

    def row(self, add_ranks: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """Means since the last report, of all ranks, by name; starts the next report.

        Losses are means over positions, of each step and then over the steps. `confidence_ece`: expected calibration error, the mean of
        |confidence − target| between bins of equal width, weighted by their counts. What has no value (no draft was judged) is NaN.
        """
        value = dict(zip(FIELDS, add_ranks(self.sums).tolist(), strict=True))
        self.sums.zero_()
        row = {name: _ratio(value[name], value["num_steps"]) for name in LOSSES}
        judged = value["num_judged"]
        total = {w: [value[f"bin_{w}_{i}"] for i in range(NUM_BINS)] for w in ("confidence", "target")}
        row["confidence_mean"] = _ratio(sum(total["confidence"]), judged)
        row["confidence_target"] = _ratio(sum(total["target"]), judged)
        gaps = (abs(c - t) for c, t in zip(total["confidence"], total["target"], strict=True))
        row["confidence_ece"] = _ratio(sum(gaps), judged)
        for tau in THRESHOLDS:
            rate = _ratio(value[f"committed@{tau}"], judged)
            row |= {f"commit_rate@{tau}": rate, f"tokens_per_step@{tau}": 1 + rate}
        row["num_tokens"] = value["num_tokens1"] + value["num_tokens2"]
        row["num_slots"] = value["num_slots"]
        return row

    def _add(self, first: str, values: Tensor) -> None:
        start = FIELDS.index(first)
        self.sums[start : start + len(values)] += values


def _ratio(total: float, count: float) -> float:
    return total / count if count else float("nan")
