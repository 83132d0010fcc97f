"""Decode on a CPU at the memory's rate: a decoder's layers and products replaced, where they are known to be the same.

No family is named here. A layer whose parts are those of the common design (RMS norm, grouped attention with a rotary embedding, RMS
norm, gated MLP) is run by :mod:`pipo.kernels` once it has given what the stock layer gives, on random input and the layer's own
weights. A layer with other parts, or another result, stays as it is; in it, as everywhere, products of a few rows of bfloat16 go
through our own kernel. Training, prefill and other caches go through the stock modules: nothing of the model changes but how
:class:`RowCache` steps are computed.

Shape legend: B rows, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipo.kernels.build import load_library
from pipo.kernels.cpu import FEW_ROWS, linear
from pipo.kernels.pages import gather
from pipo.model.drafter import Drafter
from pipo.model.fused_layer import fused_layer, is_plain, refuse_copy
from pipo.model.fused_stack import FusedStack, fused_stack


@dataclass
class Fusion:
    """What runs through kernels of our own. `stock`: a layer's name → why it stays as it is."""

    layers: list[str] = field(default_factory=list)
    stock: dict[str, str] = field(default_factory=dict)
    num_products: int = 0
    stack: FusedStack | None = None
    """All layers of the decoder and its norm, where they are run in one call."""
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def logits(self, head: nn.Linear, hidden_BH: Tensor) -> Tensor | None:
        """Logits `[B, V]` in float32 with exact sums, from bfloat16 weights; None where PyTorch should do it."""
        weight = head.weight
        plain = is_plain(head) and weight.is_cpu and weight.is_contiguous()
        trained = torch.is_grad_enabled() and (weight.requires_grad or hidden_BH.requires_grad)
        if not plain or trained or not weight.dtype == hidden_BH.dtype == torch.bfloat16:
            return None
        parts = [linear(part, weight, head.bias, torch.float32) for part in torch.split(hidden_BH, FEW_ROWS)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def undo(self) -> None:
        """Make the model what it was."""
        for step in reversed(self._undo):
            step()
        self._undo.clear()


@torch.no_grad()
def fuse(model: Drafter, move_weights: bool = False) -> Fusion:
    """Replace what can be replaced in a model.

    Args:
        move_weights: into huge pages; not where others hold on to their memory.

    Raises:
        KernelError: the kernels can't be compiled here.
    """
    load_library()
    if model.backbone.fusion is not None:
        return model.backbone.fusion  # type: ignore[no-any-return]
    if move_weights:
        gather(cast(nn.Module, model).parameters())
    fusion = Fusion()
    decoder = model.backbone.decoder
    named = [(f"layers.{i}", layer, i) for i, layer in enumerate(decoder.layers)]
    if model.mtp is not None:
        named.append(("mtp.layers.0", model.mtp.layers[0], model.backbone.num_layers))
    for name, layer, index in named:
        fused = fused_layer(model, layer, index)
        if isinstance(fused, str):
            fusion.stock[name] = fused
        else:
            fusion.layers.append(name)
            _replace(layer, fused, fusion)
    fusion.stack = fused_stack(model)
    for module in list(cast(nn.Module, model).modules()):
        if is_plain(module) and module.weight.dtype == torch.bfloat16 and module.weight.device.type == "cpu":
            _replace(module, _FewRows(module, module.forward), fusion)
            fusion.num_products += 1
    model.backbone.fusion = fusion
    fusion._undo.append(lambda: setattr(model.backbone, "fusion", None))
    return fusion


def _replace(module: nn.Module, forward: Callable[..., Any], fusion: Fusion) -> None:
    before = module.__dict__.get("forward")
    module.forward = forward

    def undo() -> None:
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = before

    fusion._undo.append(undo)


class _FewRows:
    """The forward of a linear layer: our product for a few rows of bfloat16 while nothing is trained."""

    def __init__(self, module: nn.Linear, stock: Callable[[Tensor], Tensor]) -> None:
        self._module, self._stock = module, stock

    def __call__(self, x: Tensor) -> Tensor:
        weight = self._module.weight
        few = x.numel() <= FEW_ROWS * x.shape[-1] and weight.is_cpu and x.dtype == weight.dtype == torch.bfloat16
        if not few or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not weight.is_contiguous():
            return self._stock(x)
        return linear(x, weight, self._module.bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> _FewRows:
        raise refuse_copy()
