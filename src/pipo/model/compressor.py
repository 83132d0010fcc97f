"""The compressor: two embeddings in, one latent out. Section 3.1, eq. 1 (`z_i = f([e(t_2i); e(t_2i+1)])`).

Shape legend: B batch, T slots (even), L = T/2 pairs, H width.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from pipo.errors import ConfigError, PairingError


class Compressor(nn.Module):
    """Folds each pair of slot embeddings into one latent.

    `linear` starts as the sum of the two embeddings. `mlp` starts as `SiLU(a) + SiLU(b)`, about half the sum
    for small inputs: both start from what the backbone can read, which a random start does not.
    """

    def __init__(self, hidden_size: int, compressor_type: str) -> None:
        super().__init__()
        h = hidden_size
        if compressor_type == "linear":
            self.linear = nn.Linear(2 * h, h)
        elif compressor_type == "mlp":
            self.mlp = nn.Sequential(nn.Linear(2 * h, 2 * h), nn.SiLU(), nn.Linear(2 * h, h))
        else:
            raise ConfigError(f"compressor_type must be mlp or linear, got {compressor_type!r}")
        self.compressor_type = compressor_type

    def reset_parameters(self) -> None:
        """Write the initial weights: identities and zeros, nothing random."""
        if self.compressor_type == "mlp":
            widen, fold = cast(nn.Linear, self.mlp[0]), cast(nn.Linear, self.mlp[2])
            nn.init.eye_(widen.weight)
            nn.init.zeros_(widen.bias)
        else:
            fold = self.linear
        h = fold.out_features
        nn.init.eye_(fold.weight[:, :h])
        nn.init.eye_(fold.weight[:, h:])
        nn.init.zeros_(fold.bias)

    def forward(self, embeddings_BTH: Tensor) -> Tensor:
        """`[B, T, H] → [B, L, H]`, latents in the input's dtype.

        Raises:
            PairingError: `T` is odd.
        """
        batch, slots, width = embeddings_BTH.shape
        if slots % 2:
            raise PairingError(f"slots come in pairs, got {slots} of them: pad the sequence to an even length")
        pairs_BL2H = embeddings_BTH.reshape(batch, slots // 2, 2 * width)
        return self.linear(pairs_BL2H) if self.compressor_type == "linear" else self.mlp(pairs_BL2H)  # type: ignore[no-any-return]
