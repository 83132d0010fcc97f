"""The pieces that a PIPO model and a regular model with an MTP block share: each is used by forwards, engine and reference alike.

Shape legend: B batch, L positions (pairs, or tokens of a regular model), H width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from transformers.cache_utils import Cache

from pipo.errors import ConfigError
from pipo.losses.head import OutputMap
from pipo.model.backbone import Backbone, LayerCall


class Drafter:
    """A backbone, a head, and an MTP block that drafts one token ahead (`mtp` is None where there is none)."""

    backbone: Backbone
    lm_head: Any
    mtp: Any

    def embed(self, ids: Tensor) -> Tensor:
        """`[...] → [..., H]`: embeddings of token ids."""
        return self.backbone.embed(ids)

    def run_backbone(
        self,
        inputs_BLH: Tensor,
        position_ids_BL: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, LayerCall]:
        """`h [B, L, H]` after the final norm (eq. 2), and how the template layer was called, for :meth:`run_mtp`."""
        hidden_BLH, call = self.backbone.run(inputs_BLH, position_ids_BL, attention_mask, cache)
        # A final norm that is trained in float32 under autocast gives float32, with which the head would multiply slowly.
        return hidden_BLH.to(inputs_BLH.dtype), call

    def run_mtp(self, following_BL: Tensor, hidden_BLH: Tensor, call: LayerCall, cache: Cache | None = None) -> Tensor:
        """`d [B, L, H]` from the token that follows each position and the backbone's `h` (eq. 3).

        Raises:
            ConfigError: this model has no MTP block.
        """
        if self.mtp is None:
            raise ConfigError("this base model has no MTP block (no mtp.* tensors), so it can't draft")
        return cast(Tensor, self.mtp(self.embed(following_BL), hidden_BLH, call, cache))

    def head(self, hidden: Tensor) -> Tensor:
        """`[..., H] → [..., V]`: logits, with the family's logit scale or soft cap."""
        return self.backbone.scale_logits(self.lm_head(hidden))

    def sampling_logits(self, hidden_BH: Tensor) -> Tensor:
        """`[B, H] → [B, V]`: logits to draw from, float32. See :meth:`pipo.model.backbone.Backbone.sampling_logits`."""
        return self.backbone.sampling_logits(self.lm_head, hidden_BH)

    def output_map(self) -> OutputMap:
        """The same map as plain data, for the losses. See :meth:`pipo.model.backbone.Backbone.output_map`."""
        return self.backbone.output_map(self.lm_head)
