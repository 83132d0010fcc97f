"""The output map of a model as plain data: what turns hidden states into logits, and gradients of logits back.

`z = cap·tanh(u / cap)`, `u = (W·h + b)·factor / divisor`. Products are summed in float32 (float64 where the operands are).

Shape legend: C positions, H width, V vocabulary, K vocabulary entries of a position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipo.errors import ConfigError

BLOCK_BYTES = 64 * 2**20
"""Of the head matrix, converted at a time where its rows must be widened for a product."""


@dataclass(frozen=True)
class LogitScale:
    """A family's logit scale and soft cap: `logits / divisor`, then `· factor`, then `cap·tanh(logits / cap)`."""

    divisor: float | None = None
    factor: float | None = None
    cap: float | None = None

    def apply(self, logits: Tensor) -> Tensor:
        """Logits of any shape and dtype, scaled and capped; the same tensor where the family does neither."""
        if self.divisor is not None:
            logits = logits / self.divisor
        if self.factor is not None:
            logits = logits * self.factor
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits

    def slope(self, logits: Tensor) -> Tensor | float:
        """`dz/du` at scaled and capped logits `z`, with `u` what the head matrix gives."""
        slope = (1.0 if self.factor is None else self.factor) / (1.0 if self.divisor is None else self.divisor)
        return slope if self.cap is None else (1.0 - (logits / self.cap).square()).mul_(slope)


@dataclass(frozen=True)
class OutputMap:
    """A linear head with its logit scale. The weight is the model's own tensor, not a copy.

    `weight [V, H]`, `bias [V]` or None, any float dtype.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: LogitScale = LogitScale()

    def __post_init__(self) -> None:
        """Raise `ConfigError` where the shapes are not those of a linear head."""
        if self.weight.dim() != 2 or (self.bias is not None and self.bias.shape != self.weight.shape[:1]):
            bias = None if self.bias is None else list(self.bias.shape)
            raise ConfigError(
                f"a head has a weight [V, H] and a bias [V] or none, got {list(self.weight.shape)} and {bias}"
            )

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.weight.shape[0]

    @torch.no_grad()
    def logits(self, hidden_CH: Tensor) -> Tensor:
        """`[C, H] → [C, V]` scaled and capped logits, summed and kept in float32 (float64). Without gradient."""
        wide = self._wide(hidden_CH)
        if self._multiplies_narrow(hidden_CH):
            out_CV = torch.mm(hidden_CH, self.weight.T, out_dtype=wide)
        else:
            wide_CH = hidden_CH.to(wide)
            out_CV = wide_CH.new_empty(len(hidden_CH), self.vocab_size)
            for rows, weight in self._blocks(wide):
                torch.mm(wide_CH, weight.T, out=out_CV[:, rows])
        if self.bias is not None:
            out_CV += self.bias
        return self.scale.apply(out_CV)

    def pull_back(self, gradient_CV: Tensor, hidden_CH: Tensor) -> Tensor:
        """The gradient in `hidden` `[C, H]`, wide, from that in what the head matrix gives."""
        wide = gradient_CV.dtype
        if self._multiplies_narrow(hidden_CH):
            return torch.mm(gradient_CV.to(self.weight.dtype), self.weight, out_dtype=wide)
        out_CH = gradient_CV.new_zeros(len(gradient_CV), self.weight.shape[1])
        for rows, weight in self._blocks(wide):
            out_CH.addmm_(gradient_CV[:, rows], weight)
        return out_CH

    def pull_back_some(self, gradient_CK: Tensor, ids_CK: Tensor) -> Tensor:
        """As :meth:`pull_back`, where a position's gradient is zero but at `ids`."""
        rows_CKH = self.weight[ids_CK].to(gradient_CK.dtype)
        return torch.bmm(gradient_CK[:, None], rows_CKH)[:, 0]

    def add_weight_gradient(self, total_VH: Tensor, gradient_CV: Tensor, hidden_CH: Tensor) -> None:
        """Add the gradient in `weight` to `total`, which is wide."""
        if self._multiplies_narrow(hidden_CH):
            total_VH += torch.mm(gradient_CV.to(hidden_CH.dtype).T, hidden_CH, out_dtype=total_VH.dtype)
        else:
            total_VH.addmm_(gradient_CV.T, hidden_CH.to(total_VH.dtype))

    def _wide(self, hidden: Tensor) -> torch.dtype:
        return torch.float64 if torch.float64 in (hidden.dtype, self.weight.dtype) else torch.float32

    def _multiplies_narrow(self, hidden: Tensor) -> bool:
        """Whether the device multiplies bfloat16 and sums in float32. Not for float16: a gradient may be below its range."""
        return self.weight.is_cuda and self.weight.dtype == hidden.dtype == torch.bfloat16

    def _blocks(self, wide: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the wide dtype, by blocks of rows; in one block where that takes no copy."""
        num_rows = self.vocab_size
        if self.weight.dtype != wide:
            num_rows = max(1, BLOCK_BYTES // (wide.itemsize * self.weight.shape[1]))
        for start in range(0, self.vocab_size, num_rows):
            rows = slice(start, min(start + num_rows, self.vocab_size))
            yield rows, self.weight[rows].to(wide)
