"""The cache of one prompt while it is prefilled, and of one row on its own: what :class:`pipo.model.cache.RowCache` takes in and gives out.

Shape legend: N key-value heads, L positions, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from pipo.errors import UnsupportedModelError

States = list[dict[tuple[str, int], Tensor] | None]
"""Linear-attention states of one row, per layer: `(name, index)` → tensor; `None` for a layer of keys and values."""


@dataclass
class RowState:
    """One row's cache, on its own: `entries` per layer, keys and values `[N, L, D]` or `None` for a layer of states; `states`."""

    entries: list[tuple[Tensor, Tensor] | None]
    states: States

    def num_bytes(self) -> int:
        """Memory of keys and values."""
        return sum(t.numel() * t.element_size() for pair in self.entries if pair is not None for t in pair)

    @staticmethod
    def bytes_of_states(states: States) -> int:
        """Memory of linear-attention states."""
        return sum(t.numel() * t.element_size() for state in states if state is not None for t in state.values())


def prefill_states(prefilled: Cache, row: int = 0) -> States:
    """A copy of the linear-attention states that a prefill has reached, of one row."""
    found: States = []
    for layer in prefilled.layers:
        if not isinstance(layer, LinearAttentionLayer):
            found.append(None)
            continue
        state = {}
        for name in ("conv_states", "recurrent_states"):
            for index, tensor in getattr(layer, name).items():
                if tensor is not None:
                    state[name, index] = tensor[row].clone()
        found.append(state)
    return found


def resume_prefill(config: PreTrainedConfig, row: RowState, length: int, states: States) -> Cache:
    """A prefill cache that goes on after the first `length` positions of a kept row."""
    cache = prefill_cache(config)
    for layer, entry, state in zip(cache.layers, row.entries, states, strict=True):
        if isinstance(layer, LinearAttentionLayer):
            assert state is not None
            for (name, index), tensor in state.items():
                getattr(layer, name)[index] = tensor[None].clone()
                ready = "is_conv_states_initialized" if name == "conv_states" else "is_recurrent_states_initialized"
                getattr(layer, ready)[index] = True
                if name == "conv_states":
                    layer.conv_kernel_size[index] = tensor.shape[-1]
                    layer.dtype, layer.device = tensor.dtype, tensor.device
                layer.has_previous_state[index] = True
        elif entry is not None:
            layer.update(*(t[None, :, :length] for t in entry))
    return cache


def prefill_cache(config: PreTrainedConfig) -> Cache:
    """An empty cache for one prefill: the backbone's layers and one more for the MTP block; nothing is ever dropped."""
    layers: list[Any] = list(DynamicCache(config=config).layers)
    for index, layer in enumerate(layers):
        if isinstance(layer, DynamicSlidingWindowLayer):
            layers[index] = DynamicLayer()
        elif type(layer) not in (DynamicLayer, LinearAttentionLayer):
            raise UnsupportedModelError(f"decoding {config.model_type!r} needs a cache of kind {type(layer).__name__}")
    return Cache(layers=[*layers, DynamicLayer()])


def measure_bytes(prefilled: Cache) -> tuple[int, int]:
    """Bytes of cache per row, and per position of a row, read off a prefill of one row and one position."""
    row_bytes = position_bytes = 0
    for layer in prefilled.layers:
        if isinstance(layer, LinearAttentionLayer):
            states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
            row_bytes += sum(t.numel() * t.element_size() for t in states if t is not None)
        elif layer.is_initialized:
            position_bytes += sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
    return row_bytes, position_bytes
