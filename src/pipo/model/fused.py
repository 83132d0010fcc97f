"""Decode on a CPU at the memory's rate: a decoder's layers and products replaced, where they are known to be the same.

No family is named here. A layer whose parts are those of the common design (RMS norm, grouped attention with a rotary embedding, RMS
norm, gated MLP) is run by :mod:`pipo.kernels` once it has given what the stock layer gives, on random input and the layer's own
weights. A layer with other parts, or another result, stays as it is; in it, as everywhere, products of a few rows of bfloat16 go
through our own kernel. Training, prefill and other caches go through the stock modules: nothing of the model changes but how
:class:`RowCache` steps are computed.

Shape legend: B rows, T new positions, H width, S cached positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from pipo.kernels.build import load_library
from pipo.kernels.cpu import FEW_ROWS, LAYER_ROWS, DecoderLayer, LayerStack, LayerWeights, linear, rms_norm
from pipo.kernels.pages import gather
from pipo.model.backbone import LayerCall
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
        if not weight.dtype == hidden_BH.dtype == torch.bfloat16 or not weight.is_contiguous():
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
        why = _fuse_layer(model, layer, index, fusion)
        if why is None:
            fusion.layers.append(name)
        else:
            fusion.stock[name] = why
    fusion.stack = _fuse_stack(model)
    for module in list(cast(nn.Module, model).modules()):
        if _is_plain(module) and module.weight.dtype == torch.bfloat16 and module.weight.device.type == "cpu":
            _replace(module, _few_rows(module, module.forward), fusion)
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


def _few_rows(module: nn.Linear, stock: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A product that is ours for a few rows of bfloat16 while nothing is trained."""

    def forward(x: Tensor) -> Tensor:
        weight = module.weight
        few = x.numel() <= FEW_ROWS * x.shape[-1] and x.dtype == weight.dtype == torch.bfloat16
        if not few or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not weight.is_contiguous():
            return stock(x)
        return linear(x, weight, module.bias)

    return forward


# --- layers -------------------------------------------------------------------------------------------


def _fuse_layer(model: Drafter, layer: nn.Module, index: int, fusion: Fusion) -> str | None:
    """Replace a layer's forward; or why not."""
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
    run = _FusedLayer(layer, kernel, index, layer.forward)
    off, tolerance = _difference(model, run, index), TOLERANCE[kernel.dtype]
    if not off <= tolerance:
        return f"its result is another one: {off:.2g} off, more than {tolerance:g}"
    _replace(layer, run, fusion)
    return None


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
    if others := [name for name, module in products.items() if not _is_plain(module)]:
        return f"{', '.join(others)} are no plain linear layers"
    if any(products[name].bias is not None for name in MLP_PARTS):
        return "its MLP has biases"
    norms = {name: getattr(attention, name, None) for name in HEAD_NORMS}
    heads: dict[str, Any] = {name: None if norm is None else norm.weight for name, norm in norms.items()}
    first, second = layer.input_layernorm, layer.post_attention_layernorm
    weights: dict[str, Any] = {n[0]: products[n].weight for n in ATTENTION_PARTS}
    weights |= {f"{n[0]}_bias": products[n].bias for n in ATTENTION_PARTS}
    weights |= {n.removesuffix("_proj"): products[n].weight for n in MLP_PARTS}
    return LayerWeights(
        **weights,
        **heads,
        norm1=first.weight,
        norm2=second.weight,
        head_dim=int(attention.head_dim),
        eps1=_eps(first),
        eps2=_eps(second),
        head_eps=_eps(norms["q_norm"]),
        scale=float(attention.scaling),
    )


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """A linear layer with numbers as its weight: a quantised weight is of another type, and has nothing at its address."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


def _eps(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6)))


class _FusedLayer:
    """A decoder layer's forward: ours for a step of few rows, the stock one for everything else."""

    def __init__(self, layer: Any, kernel: DecoderLayer, index: int, stock: Callable[..., Any]) -> None:
        self.kernel, self.stock = kernel, stock
        self._index = index
        self._stack = LayerStack([kernel])
        # Where each module and weight is looked up, and what was found there.
        self._held = [(holder, name, found) for holder in _holders(layer) for name, found in holder.items()]
        self._looked = False

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
        """Keys and values of this layer, where they are there and of its dtype."""
        held: Any = cache.layers[self._index]
        return None if held.keys is None or held.keys.dtype != self.kernel.dtype else (held.keys, held.values)

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
        if position_embeddings is not None and _is_step(hidden_states, past_key_values, self.kernel.dtype):
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


def _is_step(hidden_BTH: Tensor, cache: Any, dtype: torch.dtype) -> bool:
    """Whether this is a decoding step of few enough rows, and nothing is trained."""
    return (
        isinstance(cache, RowCache)
        and hidden_BTH.dtype == dtype
        and hidden_BTH.shape[0] * hidden_BTH.shape[1] <= LAYER_ROWS
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


class FusedStack:
    """A decoder that does nothing but run its layers, all of them fused, one after the other: in one call, with the final norm."""

    def __init__(self, model: Drafter) -> None:
        self._backbone = model.backbone
        decoder = model.backbone.decoder
        self._layers: list[_FusedLayer] = [layer.forward for layer in decoder.layers]
        self._norm = decoder.norm.weight
        self._stack = LayerStack([layer.kernel for layer in self._layers], self._norm, _eps(decoder.norm))

    def run(
        self, inputs_BTH: Tensor, position_ids_BT: Tensor | None, mask: Any, cache: Any
    ) -> tuple[Tensor, LayerCall] | None:
        """As :meth:`pipo.model.backbone.Backbone.run`; None where it is not a step that this can do."""
        if position_ids_BT is None or not _is_step(inputs_BTH, cache, self._stack.dtype):
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


def _fuse_stack(model: Drafter) -> FusedStack | None:
    """All of a decoder's layers in one call, if they are all that it does."""
    decoder: Any = model.backbone.decoder
    if not all(isinstance(layer.forward, _FusedLayer) for layer in decoder.layers) or not hasattr(
        decoder, "rotary_emb"
    ):
        return None
    width, dtype = model.backbone.hidden_size, decoder.layers[0].forward.kernel.dtype
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
    made, normed = FusedStack(model), rms_norm(seen[-1][2], decoder.norm.weight, _eps(decoder.norm))
    off = float((normed.float() - last.float()).norm() / last.float().norm())
    return made if off <= TOLERANCE[dtype] else None


def _holders(layer: Any) -> list[dict[str, Any]]:
    modules = [layer._modules, layer.self_attn._modules, layer.mlp._modules]
    inside = [module for parts in modules for module in parts.values()]
    return [*modules, *(module._parameters for module in inside if module._parameters)]


def _difference(model: Drafter, run: _FusedLayer, index: int) -> float:
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
