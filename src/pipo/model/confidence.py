"""The confidence head: is this draft worth committing? Section 3.1, eq. 4.

Shape legend: B batch, L pairs, H width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConfidenceHead(nn.Module):
    """`w2·SiLU(W1·norm([h; d]))`, `2H → H → 1`, no biases. The gate compares its sigmoid with the threshold."""

    def __init__(self, hidden_size: int, norm: nn.Module) -> None:
        """`norm`: over `2H`, of the backbone's own kind (Qwen3.5's multiplies by `1 + weight`)."""
        super().__init__()
        self.norm = norm
        self.fc1 = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.fc2 = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, backbone_hidden_BLH: Tensor, mtp_hidden_BLH: Tensor) -> Tensor:
        """Confidence before the sigmoid, float32 `[B, L]`."""
        features = torch.cat([backbone_hidden_BLH, mtp_hidden_BLH], dim=-1)
        score: Tensor = self.fc2(F.silu(self.fc1(self.norm(features))))
        return score.squeeze(-1).float()
