"""A decoder layer of the common design, run by :mod:`pipo.kernels`: recognised by its parts, and proved on its own weights.

Shape legend: B rows, T new positions, H width, S cached positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipo.errors import KernelError
from pipo.kernels.cpu import LAYER_ROWS, DecoderLayer, LayerStack, LayerWeights, rms_norm
from pipo.model.cache import RowCache, layer_kinds
from pipo.model.drafter import Drafter
from pipo.model.row_state import prefill_cache

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
MLP_PARTS = {"gate_proj", "up_proj", "down_proj"}
TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 1e-4}
"""Largest relative error of what a layer adds and of the keys and values it writes, in the 2-norm."""
CHECKED_LENGTHS = (3, 9)
"""Cached positions of the rows on which a layer is compared."""


def fused_layer(model: Drafter, layer: Any, index: int) -> FusedLayer | str:
    """A layer's forward by our kernel; or why it stays as it is. `index`: its place in a cache."""
    weights = _weights_of(layer)
    if isinstance(weights, str):
        return weights
    backbone = model.backbone
    kind = layer_kinds(backbone.config)[index if index < backbone.num_layers else backbone.template_index]
    if kind != "full_attention":
        return f"its attention is {kind.removesuffix('_attention')}, not full"
    try:
        kernel = DecoderLayer(weights)
    except ValueError as error:
        return str(error)
    run = FusedLayer(layer, kernel, index, layer.forward)
    off, tolerance = _difference(model, run, index), TOLERANCE[kernel.dtype]
    if not off <= tolerance:
        return f"its result is another one: {off:.2g} off, more than {tolerance:g}"
    return run


def _weights_of(layer: Any) -> LayerWeights | str:
    """A layer of the common design as the kernel takes it; or what is different."""
    parts = set(dict(layer.named_children()))
    if parts != PARTS:
        return f"its parts are {', '.join(sorted(parts))}"
    attention, mlp = layer.self_attn, layer.mlp
    inside, inside_mlp = (set(dict(m.named_children())) for m in (attention, mlp))
    inside_mlp = {name for name in inside_mlp if any(True for _ in getattr(mlp, name).parameters())}
    if inside not in (ATTENTION_PARTS, ATTENTION_PARTS | HEAD_NORMS) or inside_mlp != MLP_PARTS:
        return f"its attention has {', '.join(sorted(inside))}, its MLP {', '.join(sorted(inside_mlp))}"
    products = {n: getattr(attention, n) for n in ATTENTION_PARTS} | {n: getattr(mlp, n) for n in MLP_PARTS}
    if others := [name for name, module in products.items() if not is_plain(module)]:
        return f"{', '.join(others)} are no plain linear layers"
    if any(products[name].bias is not None for name in MLP_PARTS):
        return "its MLP has biases"
    norms = {name: getattr(attention, name, None) for name in HEAD_NORMS}
    heads: dict[str, Any] = {name: None if norm is None else norm.weight for name, norm in norms.items()}
    first, second = layer.input_layernorm, layer.post_attention_layernorm
    if others := [type(norm).__name__ for norm in (first, second, *norms.values()) if norm and not _is_rms_norm(norm)]:
        return f"its {others[0]} is no RMS norm"
    if not _is_silu(getattr(mlp, "act_fn", None)):
        return "its MLP's activation is not SiLU"
    if missing := [name for name in ("head_dim", "scaling") if not hasattr(attention, name)]:
        return f"its attention does not say its {', '.join(missing)}"
    weights: dict[str, Any] = {n[0]: products[n].weight for n in ATTENTION_PARTS}
    weights |= {f"{n[0]}_bias": products[n].bias for n in ATTENTION_PARTS}
    weights |= {n.removesuffix("_proj"): products[n].weight for n in MLP_PARTS}
    return LayerWeights(
        **weights,
        **heads,
        norm1=first.weight,
        norm2=second.weight,
        head_dim=int(attention.head_dim),
        eps1=eps_of(first),
        eps2=eps_of(second),
        head_eps=eps_of(norms["q_norm"]),
        scale=float(attention.scaling),
    )


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """A linear layer with numbers as its weight: a quantised weight is of another type, and has nothing at its address."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


def _is_rms_norm(norm: nn.Module) -> bool:
    """Looked at by itself: how far another kind would put a whole layer off depends on the layer's input."""
    if [name for name, _ in norm.named_parameters()] != ["weight"]:
        return False
    weight: Any = norm.weight
    # Numbers whose mean is not 0, which other norms subtract.
    x = 1 + torch.randn(2, weight.shape[-1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    return _alike(norm(x), rms_norm(x, weight, eps_of(norm)))


def _is_silu(function: Any) -> bool:
    x = torch.linspace(-8, 8, 65)
    return callable(function) and _alike(function(x), F.silu(x))


def _alike(a: Tensor, b: Tensor) -> bool:
    return float((a.float() - b.float()).norm()) <= TOLERANCE[torch.bfloat16] * float(b.float().norm())


def eps_of(norm: Any) -> float:
    """The epsilon of an RMS norm, by whichever name its family has for it."""
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6)))


class FusedLayer:
    """A decoder layer's forward: ours for a step of few rows, the stock one for everything else."""

    def __init__(self, layer: Any, kernel: DecoderLayer, index: int, stock: Callable[..., Any]) -> None:
        self.kernel, self.stock = kernel, stock
        self._index = index
        self._stack = LayerStack([kernel])
        # Where each module and weight is looked up, and what was found there.
        self._held = [(holder, name, found) for holder in _holders(layer) for name, found in holder.items()]
        self._looked = False

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedLayer:
        raise refuse_copy()

    def unchanged(self) -> bool:
        """Nobody has put another module or weight in, or moved one, since. Looked at after every prefill: the first step tells."""
        if not self._looked:
            replaced = any(holder.get(name) is not found for holder, name, found in self._held)
            self._looked = not replaced and not self.kernel.moved()
        return self._looked

    def look_again(self) -> None:
        """Other work was done since."""
        self._looked = False

    def entries(self, cache: RowCache) -> tuple[Tensor, Tensor] | None:
        """Keys and values of this layer, where they are there and both of its dtype."""
        held: Any = cache.layers[self._index]
        if held.keys is None or not held.keys.dtype == held.values.dtype == self.kernel.dtype:
            return None
        return held.keys, held.values

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        if position_embeddings is not None and is_step(hidden_states, past_key_values, self.kernel.dtype):
            entries = self.entries(past_key_values)
            cos, sin = position_embeddings
            if entries is not None and cos.dtype == self.kernel.dtype and self.unchanged():
                keys, values = entries
                return self._stack(hidden_states, cos, sin, past_key_values.positions_BT, [keys], [values])
        self.look_again()
        return self.stock(
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )


def refuse_copy() -> KernelError:
    """A copy of the model would go on computing with the weights of this one."""
    return KernelError(
        "a model that decodes by kernels of its own can't be copied: call model.backbone.fusion.undo() first, or choose kernels='torch'"
    )


def is_step(hidden_BTH: Tensor, cache: Any, dtype: torch.dtype) -> bool:
    """Whether this is a decoding step of few enough rows, and nothing is trained."""
    return (
        type(cache) is RowCache  # not one whose entries lie otherwise
        and hidden_BTH.dtype == dtype
        and hidden_BTH.shape[0] * hidden_BTH.shape[1] <= LAYER_ROWS
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def _holders(layer: Any) -> list[dict[str, Any]]:
    modules = [layer._modules, layer.self_attn._modules, layer.mlp._modules]
    inside = [module for parts in modules for module in parts.values()]
    return [*modules, *(module._parameters for module in inside if module._parameters)]


def _difference(model: Drafter, run: FusedLayer, index: int) -> float:
    """How far our layer is off the stock one in a step of two rows of unlike length: the largest relative error."""
    generator = torch.Generator().manual_seed(0)
    config, weights = model.backbone.config, run.kernel.weights
    dtype, width = run.kernel.dtype, len(weights.norm1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    heads, head_dim = len(weights.k) // weights.head_dim, weights.head_dim
    entries = [random(len(CHECKED_LENGTHS), heads, max(CHECKED_LENGTHS), head_dim) for _ in range(2)]
    x_BTH = random(len(CHECKED_LENGTHS), 2, width) * 0.05  # small beside what the layer adds, which is what counts
    results: list[tuple[Tensor, ...]] = []
    for forward in (run.stock, run):
        cache = RowCache(config, x_BTH.device)
        filled = prefill_cache(config)
        filled.layers[index].update(*(t.clone() for t in entries))
        cache.adopt(filled, CHECKED_LENGTHS)
        positions_BT = cache.begin(2)
        masks = cache.masks(dtype)
        mask = masks["full_attention"] if isinstance(masks, dict) else masks
        angles = model.backbone.decoder.rotary_emb(x_BTH, positions_BT)
        out = forward(
            x_BTH,
            attention_mask=mask,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            position_embeddings=angles,
        )
        out = out[0] if isinstance(out, tuple) else out
        written: Any = cache.layers[index]
        results.append((out - x_BTH, written.keys, written.values))
    stock, ours = results
    errors = [
        float((a.float() - b.float()).norm() / a.float().norm().clamp_min(1e-9))
        for a, b in zip(stock, ours, strict=True)
    ]
    return max(errors)
