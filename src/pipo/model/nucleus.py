"""Top-p over the whole vocabulary without sorting it: two histograms over the bits of the logits. And the exact sums it rests on.

Shapes: S rows, V vocabulary, N bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNITS = 2.0**44
"""Weights, at most 1, are counted in whole units of 2⁻⁴⁴: sums over a vocabulary fit an int64 and are exact in any order,
on any device."""

_BINS = 2**15
_LOW_BITS = 16
_LOW_BINS = 2**_LOW_BITS


def units(weights: Tensor) -> Tensor:
    """int64: weights in [0, 1] in whole units, cut off."""
    return (weights * UNITS).long()


def nucleus_cut(logits_SV: Tensor, top_p_S: Tensor) -> Tensor:
    """Per row the smallest logit that top-p keeps: a token stays when those before it hold less than `top_p` of the mass.

    Args:
        logits_SV: float32, the largest of each row 0.
        top_p_S: below 1.

    The bits of −logit, read as a whole number, grow as the logit falls. A histogram of the mass over their upper half
    finds the bin in which the mass is reached, and one over the lower half the logit itself.
    """
    key_SV = logits_SV.abs().view(torch.int32)
    units_SV = units(logits_SV.exp())
    high_SV = (key_SV >> _LOW_BITS).long()
    mass_SN = _histogram(high_SV, units_SV, _BINS)
    cumulated_SN = mass_SN.cumsum(-1)
    wanted_S1 = (top_p_S.double() * cumulated_SN[:, -1]).ceil().long().unsqueeze(1)
    bin_S1 = torch.searchsorted(cumulated_SN, wanted_S1).clamp_(max=_BINS - 1)
    before_S1 = (cumulated_SN - mass_SN).gather(1, bin_S1)
    low_SV = (key_SV & (_LOW_BINS - 1)).long()
    inside_SN = _histogram(low_SV, units_SV.masked_fill_(high_SV != bin_S1, 0), _LOW_BINS)
    low_S1 = torch.searchsorted(inside_SN.cumsum(-1), wanted_S1 - before_S1).clamp_(max=_LOW_BINS - 1)
    return -((bin_S1 << _LOW_BITS) | low_S1).int().view(torch.float32).squeeze(1)


def _histogram(bins_SV: Tensor, units_SV: Tensor, num_bins: int) -> Tensor:
    """int64 `[S, num_bins]`. Whole numbers: the order in which a GPU adds them does not matter."""
    return units_SV.new_zeros(len(units_SV), num_bins).scatter_add_(1, bins_SV, units_SV)
