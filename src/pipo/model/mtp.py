"""The MTP block: one decoder layer that reads token 1 beside its hidden state and drafts token 2.

Section 3.1, eq. 3: `u_i = W_fc·[norm_e(e(t_{2i+2})); norm_h(h_i)]`, one decoder layer of the backbone's own kind over
`u_0 … u_i`, its norm. Module names are those of Qwen3.5's own `mtp.*` weights.

Shape legend: B batch, L pairs, H width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from pipo.model.backbone import Backbone, LayerCall


class MtpBlock(nn.Module):
    """One more decoder layer on top of a backbone, fed with the embedding of the token just written."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        h = backbone.hidden_size
        self.pre_fc_norm_embedding = backbone.new_norm(h)
        self.pre_fc_norm_hidden = backbone.new_norm(h)
        self.fc = nn.Linear(2 * h, h, bias=False)
        self.layers = nn.ModuleList([backbone.new_layer(cache_index=backbone.num_layers)])
        self.norm = backbone.new_norm(h)

    def copy_from(self, backbone: Backbone) -> None:
        """Start from the backbone: its template layer and final norm, and a `W_fc` that passes `h` and `e` on by halves."""
        self.layers[0].load_state_dict(backbone.template_layer.state_dict())
        self.norm.load_state_dict(backbone.decoder.norm.state_dict())
        h = backbone.hidden_size
        with torch.no_grad():
            for half in (self.fc.weight[:, :h], self.fc.weight[:, h:]):
                half.copy_(0.5 * torch.eye(h))

    def forward(
        self, embeddings_BLH: Tensor, hidden_BLH: Tensor, call: LayerCall, cache: Cache | None = None
    ) -> Tensor:
        """`d [B, L, H]` from the embeddings of each pair's next token 1 and the backbone's `h`.

        `call` is how the backbone called its template layer for the same pairs: same positions, same mask.
        """
        fused = self.fc(
            torch.cat([self.pre_fc_norm_embedding(embeddings_BLH), self.pre_fc_norm_hidden(hidden_BLH)], dim=-1)
        )
        kwargs: dict[str, Any] = {**call, "past_key_values": cache}
        out = self.layers[0](fused, **kwargs)
        normed: Tensor = self.norm(out[0] if isinstance(out, tuple) else out)
        # A norm that is trained in float32 under autocast gives float32: head and cache expect what they get from the backbone.
        return normed.to(hidden_BLH.dtype)
