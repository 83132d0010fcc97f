"""What a model weighs, part by part, and what its cache holds per position: read off modules that have no storage.

So any family that PIPO supports is right, and nothing is downloaded. Shape legend: N key-value heads, L positions, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, LinearAttentionLayer

from pipo.model.cache import layer_kinds
from pipo.model.modeling import PipoForCausalLM
from pipo.model.prefill import Prefill
from pipo.model.shapes import pipo_without_weights

STATE_FLOPS = 7
"""Operations per entry of a linear-attention state and position, as the gated delta rule's recurrence has them: decay (1), what the
state says of the key (2), the outer product added (2), what it says to the query (2). A chunked prefill does some more."""


@dataclass(frozen=True)
class Weights:
    """Parameters of a part. Every position uses the `dense` ones, and the share `expert_share` of the routed `experts`."""

    dense: int
    experts: int = 0
    expert_share: float = 1.0

    @property
    def per_position(self) -> float:
        """Parameters that one position is multiplied with."""
        return self.dense + self.experts * self.expert_share

    def read_by(self, positions: float) -> float:
        """Parameters that `positions` positions read together: of the experts, the expected number that any of them chose."""
        chosen: float = 1 - (1 - self.expert_share) ** positions
        return self.dense + self.experts * chosen


@dataclass(frozen=True)
class Attention:
    """An attention layer: numbers that it caches per position, operations per query and key, and how far back it looks."""

    entries: int
    flops: int
    window: int | None = None

    def seen(self, cached: float) -> float:
        """Entries that a query after `cached` others reads, its own included."""
        return cached + 1 if self.window is None else min(cached + 1, self.window)

    def seen_in(self, length: int) -> float:
        """Entries that the queries of a prompt of `length` positions read, all together: exactly those that are not masked."""
        inner = length if self.window is None else min(length, self.window)
        return inner * (inner + 1) / 2 + (length - inner) * inner


@dataclass(frozen=True)
class ModelSizes:
    """A PIPO model's parts. Its backbone and head are the regular model's; its MTP block is what drafts in speculative decoding."""

    backbone: Weights
    head: Weights
    mtp: Weights
    compressor: Weights
    confidence: Weights
    width: int
    vocab_size: int
    embedding: int
    """Parameters of an embedding that is not the head: held, and looked up by the row."""
    layers: tuple[Attention, ...]
    """The backbone's attention layers."""
    mtp_layer: Attention
    state_bytes: int
    """Linear-attention states of a row, in their own number formats."""
    state_flops: int
    """Operations on them, per position."""

    def held(self, method: str) -> tuple[int, int]:
        """Parameters in memory: of the layers (backbone's and MTP block's), and all others."""
        layers = [self.backbone] + [self.mtp] * (method != "regular")
        others = [self.head] + [self.compressor, self.confidence] * (method == "pipo")
        inner, outer = (sum(part.dense + part.experts for part in parts) for parts in (layers, others))
        return inner, self.embedding + outer

    def attention(self, method: str) -> tuple[Attention, ...]:
        """The layers that cache keys and values."""
        return self.layers if method == "regular" else (*self.layers, self.mtp_layer)


def model_sizes(config: PreTrainedConfig, compressor: str = "mlp") -> ModelSizes:
    """The sizes of a PIPO model around a regular model's config.

    Raises:
        UnsupportedModelError: PIPO does not support the family.
    """
    model = pipo_without_weights(config, compressor, torch.bfloat16)
    text = model.backbone.config
    cache = _cache_of_one_pair(model)
    kinds = layer_kinds(text)
    template = kinds[model.backbone.template_index]
    attention, states = [], []
    for layer, kind in zip(cache.layers, (*kinds, template), strict=True):
        if isinstance(layer, LinearAttentionLayer):
            states += [tensor for of in (layer.conv_states, layer.recurrent_states) for tensor in of.values()]
        else:
            attention.append(_attention(layer, text, kind))
    recurrent = sum(state.numel() for state in states if state is not None and state.dim() > 3)
    share = _expert_share(text)
    head = model.lm_head.weight
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    outside = {id(embedding), id(head)}
    return ModelSizes(
        backbone=_weights(((n, p) for n, p in model.model.named_parameters() if id(p) not in outside), share),
        head=_weights(model.lm_head.named_parameters(), share),
        mtp=_weights(model.mtp.named_parameters(), share),
        compressor=_weights(model.compressor.named_parameters(), share),
        confidence=_weights(model.confidence_head.named_parameters(), share),
        width=model.config.hidden_size,
        vocab_size=model.config.vocab_size,
        embedding=0 if embedding is head else embedding.numel(),
        layers=tuple(attention[:-1]),
        mtp_layer=attention[-1],
        state_bytes=sum(state.numel() * state.element_size() for state in states if state is not None),
        state_flops=STATE_FLOPS * recurrent,
    )


def _cache_of_one_pair(model: PipoForCausalLM) -> Cache:
    for name, module in model.named_modules():
        if name.endswith(".experts"):  # which ones are chosen is not known without values, and no cache depends on it
            module.forward = _first
    with torch.no_grad():
        prefilled = Prefill(model, [[0, 0]]).finish()
        prefilled.run_mtp(torch.zeros(1, dtype=torch.long, device=model.device))
    return prefilled.cache


def _first(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden


def _attention(layer: Any, config: PreTrainedConfig, kind: str) -> Attention:
    """From keys and values `[1, N, 1, D]`. An operation is a multiplication or an addition."""
    keys, values = layer.keys, layer.values
    flops = 2 * int(config.num_attention_heads) * (keys.shape[-1] + values.shape[-1])
    window = getattr(config, "sliding_window", None) if kind == "sliding_attention" else None
    return Attention(keys.numel() + values.numel(), flops, window)


def _weights(parameters: Iterable[tuple[str, nn.Parameter]], expert_share: float) -> Weights:
    dense = experts = 0
    for name, parameter in parameters:
        if ".experts." in name:
            experts += parameter.numel()
        else:
            dense += parameter.numel()
    return Weights(dense, experts, expert_share if experts else 1.0)


def _expert_share(config: PreTrainedConfig) -> float:
    """Share of the routed experts that one position is sent to."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    number = next((count for name in names if (count := getattr(config, name, None))), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return 1.0 if number is None or chosen is None else chosen / number
