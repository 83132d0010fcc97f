"""All layers of a decoder in one call, where they are all that it does.

Shape legend: B rows, T new positions, H width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from pipo.kernels.cpu import LayerStack, rms_norm
from pipo.model.backbone import LayerCall
from pipo.model.drafter import Drafter
from pipo.model.fused_layer import TOLERANCE, FusedLayer, eps_of, is_step


class FusedStack:
    """A decoder that does nothing but run its layers, all of them fused, one after the other: in one call, with the final norm."""

    def __init__(self, model: Drafter) -> None:
        self._backbone = model.backbone
        decoder = model.backbone.decoder
        self._layers: list[FusedLayer] = [layer.forward for layer in decoder.layers]
        self._norm = decoder.norm.weight
        self._stack = LayerStack([layer.kernel for layer in self._layers], self._norm, eps_of(decoder.norm))

    def run(
        self, inputs_BTH: Tensor, position_ids_BT: Tensor | None, mask: Any, cache: Any
    ) -> tuple[Tensor, LayerCall] | None:
        """As :meth:`pipo.model.backbone.Backbone.run`; None where it is not a step that this can do."""
        if position_ids_BT is None or not is_step(inputs_BTH, cache, self._stack.dtype):
            return None
        entries = [layer.entries(cache) for layer in self._layers]
        decoder = self._backbone.decoder
        if decoder.norm.weight is not self._norm or not all(layer.unchanged() for layer in self._layers):
            return None
        angles = decoder.rotary_emb(inputs_BTH, position_ids_BT)
        if None in entries or angles[0].dtype != self._stack.dtype:
            return None
        keys, values = zip(*cast(list[tuple[Tensor, Tensor]], entries), strict=True)
        cos, sin = angles
        hidden_BTH = self._stack(inputs_BTH, cos, sin, cache.positions_BT, keys, values)
        call: LayerCall = {
            "attention_mask": mask["full_attention"] if isinstance(mask, dict) else mask,
            "position_ids": position_ids_BT,
            "past_key_values": cache,
            "use_cache": True,
            "position_embeddings": angles,
        }
        return hidden_BTH, call


def fused_stack(model: Drafter) -> FusedStack | None:
    """All of a decoder's layers in one call, if they are all that it does."""
    decoder: Any = model.backbone.decoder
    if not all(isinstance(layer.forward, FusedLayer) for layer in decoder.layers) or not hasattr(decoder, "rotary_emb"):
        return None
    width, dtype = model.backbone.hidden_size, decoder.layers[0].forward.kernel.dtype
    if len({layer.forward.kernel.cache_shape for layer in decoder.layers}) > 1:
        return None  # their caches lie differently
    x_1TH = torch.randn(1, 2, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    seen: list[tuple[Tensor, Any, Tensor]] = []

    def record(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        seen.append((given, kwargs.get("position_embeddings"), output[0] if isinstance(output, tuple) else output))

    hooks = [layer.register_forward_hook(record, with_kwargs=True) for layer in decoder.layers]
    try:
        last = decoder(inputs_embeds=x_1TH, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    angles = decoder.rotary_emb(x_1TH, torch.arange(2)[None])
    inputs, expected = [given for given, _, _ in seen], [x_1TH, *(out for _, _, out in seen[:-1])]
    plain = all(map(torch.equal, inputs, expected)) and all(
        turned is not None and all(map(torch.equal, turned, angles)) for _, turned, _ in seen
    )
    if not plain or len(seen) != len(decoder.layers) or list(dict(decoder.norm.named_parameters())) != ["weight"]:
        return None
    weights = [layer.forward.kernel.weights for layer in decoder.layers]
    # One call reads all as numbers of one type, and finds a row in each layer's cache at the same place.
    if len({(w.q.dtype, w.k.shape, w.head_dim) for w in weights}) > 1 or decoder.norm.weight.dtype != dtype:
        return None
    made, normed = FusedStack(model), rms_norm(seen[-1][2], decoder.norm.weight, eps_of(decoder.norm))
    off = float((normed.float() - last.float()).norm() / last.float().norm())
    return made if off <= TOLERANCE[dtype] else None
