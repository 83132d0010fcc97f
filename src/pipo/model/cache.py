"""Caches at pair granularity: one entry per backbone position, which is a pair (or a token, for a regular model).

A prompt is prefilled into a cache of its own (`pipo.model.prefill`) and then adopted by :class:`RowCache`, which holds
every running request as one *row*, left-aligned: entry `s` of a row is position `s`. So rows of any length decode in one
call, positions and masks say what each row may see, and rows join and leave at any step. The MTP block's keys and
values are the last layer of the same cache.

Shape legend: B rows, T new positions, S cached positions, N key-value heads, D head width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    LinearAttentionLayer,
)

from pipo.errors import UnsupportedModelError
from pipo.kernels.pages import zeros
from pipo.model.row_state import RowState, States
from pipo.model.sampling_batch import to_device

GROWTH = 1.5
LENGTH_STEP = 64
KINDS = {"full_attention", "sliding_attention", "linear_attention"}


def layer_kinds(config: PreTrainedConfig) -> tuple[str, ...]:
    """Kind of each backbone layer: `full_attention`, `sliding_attention` or `linear_attention`.

    Raises:
        UnsupportedModelError: another kind, whose cache the engine does not know.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        one = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
        kinds = [one] * config.num_hidden_layers
    if unknown := sorted(set(kinds) - KINDS):
        raise UnsupportedModelError(
            f"decoding {config.model_type!r} needs a cache for layers of kind {', '.join(unknown)}"
        )
    return tuple(kinds)


class KeyValueRows(CacheLayerMixin):
    """Keys and values `[rows, N, capacity, D]` of one attention layer."""

    def __init__(self, owner: RowCache) -> None:
        super().__init__()
        self.owner = owner
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate like the first keys and values seen: `[any, N, any, D]`."""
        rows, capacity = self.owner.capacity
        # Zeros, not whatever memory holds: a masked entry is multiplied by zero, which does not cancel a NaN.
        self.keys, self.values = (
            zeros(rows, t.shape[1], capacity, t.shape[3], like=t) for t in (key_states, value_states)
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write `[B, N, T, D]` at the step's positions; all entries that any row can see, `[B, N, S, D]`."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        rows_B1, positions_BT = self.owner.rows_B1, self.owner.positions_BT
        # Under autocast keys may come in another dtype than values, and both in another than those of the prefill.
        self.keys[rows_B1, :, positions_BT] = key_states.transpose(1, 2).to(self.keys.dtype)
        self.values[rows_B1, :, positions_BT] = value_states.transpose(1, 2).to(self.values.dtype)
        b, s = len(rows_B1), self.owner.span
        return self.keys[:b, :, :s], self.values[:b, :, :s]

    def resize(self, rows: int, capacity: int) -> None:
        """Move to new buffers; what lies in both sizes is kept."""
        for name in ("keys", "values"):
            old: Tensor | None = getattr(self, name)
            if old is not None:
                new = zeros(rows, old.shape[1], capacity, old.shape[3], like=old)
                r, c = min(rows, old.shape[0]), min(capacity, old.shape[2])
                new[:r, :, :c] = old[:r, :, :c]
                setattr(self, name, new)

    def adopt(self, rows: slice, source: DynamicLayer) -> None:
        """Copy a prefill's entries into `rows` and clear what lies beyond."""
        if not source.is_initialized:  # the MTP block was not run: no draft of these rows is ever wanted
            if self.keys is not None and self.values is not None:
                self.keys[rows] = 0
                self.values[rows] = 0
            return
        if self.keys is None:
            self.lazy_initialization(source.keys, source.values)
        for target, tensor in ((self.keys, source.keys), (self.values, source.values)):
            assert target is not None
            target[rows, :, : tensor.shape[2]] = tensor
            target[rows, :, tensor.shape[2] :] = 0

    def move(self, source: int, target: int) -> None:
        """Overwrite row `target` with row `source`."""
        if self.keys is not None and self.values is not None:
            self.keys[target] = self.keys[source]
            self.values[target] = self.values[source]

    def release(self) -> None:
        """Give the memory back."""
        self.keys = self.values = None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Entries that :meth:`update` returns, and the position of the first."""
        return self.owner.span, 0

    def get_seq_length(self) -> int:
        """Entries before this step's, in the longest row."""
        return self.owner.span - self.owner.positions_BT.shape[1]

    def get_max_length(self) -> int:
        """No fixed maximum."""
        return -1

    def num_bytes(self) -> int:
        """Memory held."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values) if t is not None)


class StateRows(LinearAttentionLayer):
    """Convolution and recurrent states `[rows, …]` of one linear-attention layer."""

    def __init__(self, owner: RowCache, number_of_states: int) -> None:
        super().__init__(number_of_states)
        self.owner = owner
        self._all: dict[tuple[str, int], Tensor] = {}

    def begin(self) -> None:
        """Show the model the running rows, as views that it updates in place."""
        for (name, index), tensor in self._all.items():
            getattr(self, name)[index] = tensor[: len(self.owner.rows_B1)]

    def resize(self, rows: int, capacity: int) -> None:
        """Move to new buffers of `rows` rows."""
        for key, old in self._all.items():
            new = old.new_zeros(rows, *old.shape[1:])
            r = min(rows, old.shape[0])
            new[:r] = old[:r]
            self._all[key] = new

    def adopt(self, rows: slice, source: LinearAttentionLayer) -> None:
        """Copy a prefill's states into `rows`."""
        for index in range(self.number_of_states):
            self.conv_kernel_size[index] = source.conv_kernel_size[index]
            self.has_previous_state[index] = source.has_previous_state[index]
            for name, ready in (
                ("conv_states", self.is_conv_states_initialized),
                ("recurrent_states", self.is_recurrent_states_initialized),
            ):
                state: Tensor | None = getattr(source, name)[index]
                if state is None:
                    continue
                if (name, index) not in self._all:
                    self._all[name, index] = state.new_zeros(self.owner.capacity[0], *state.shape[1:])
                    self.dtype, self.device = state.dtype, state.device
                self._all[name, index][rows] = state
                ready[index] = True

    def rows(self) -> dict[tuple[str, int], Tensor]:
        """All states, `[rows, …]` each."""
        return self._all

    def move(self, source: int, target: int) -> None:
        """Overwrite row `target` with row `source`."""
        for tensor in self._all.values():
            tensor[target] = tensor[source]

    def snapshot(self) -> dict[tuple[str, int], Tensor]:
        """A copy of the running rows' states."""
        return {key: tensor[: self.owner.num_rows].clone() for key, tensor in self._all.items()}

    def restore(self, states: dict[tuple[str, int], Tensor], rows_B: Tensor | None = None) -> None:
        """Write a snapshot back, everywhere or where `rows_B` is True."""
        for key, state in states.items():
            view = self._all[key][: state.shape[0]]
            if rows_B is None:
                view.copy_(state)
            else:
                chosen = rows_B.view(-1, *[1] * (state.dim() - 1))
                view.copy_(torch.where(chosen, state, view))

    def release(self) -> None:
        """Give the memory back."""
        self._all.clear()

    def num_bytes(self) -> int:
        """Memory held."""
        return sum(t.numel() * t.element_size() for t in self._all.values())


class RowCache(Cache):
    """The running requests' cache, one row each. Grows and shrinks with what the rows hold.

    A step is `begin(positions)`, one call of the backbone, one of the MTP block.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        device: torch.device,
        fits: Callable[[int, int], bool] = lambda rows, length: True,
    ) -> None:
        """`fits(rows, length)`: whether memory may be reserved for so much; what is needed is reserved in any case."""
        self.config = config
        self.device = device
        self.fits = fits
        self.kinds = layer_kinds(config)
        self.has_states = "linear_attention" in self.kinds
        self.num_rows = 0
        self.lengths: list[int] = []
        """Entries that each row holds."""
        self.capacity = (0, 0)
        self.span = 0
        self._begun = 0  # entries of the longest row in the step that has begun
        self.rows_B1 = torch.zeros(0, 1, dtype=torch.long, device=device)
        self.positions_BT = torch.zeros(0, 1, dtype=torch.long, device=device)
        states = [getattr(layer, "number_of_states", 1) for layer in DynamicCache(config=config).layers]
        self.limits: tuple[int, int] = (sys.maxsize, sys.maxsize)
        """Rows and entries of a row that are never exceeded."""
        layers = [self.new_layer(kind, count) for kind, count in zip(self.kinds, states, strict=True)]
        super().__init__(layers=[*layers, self.new_layer("full_attention", 1)])

    def new_layer(self, kind: str, number_of_states: int) -> Any:
        """The cache of one layer of this kind."""
        return StateRows(self, number_of_states) if kind == "linear_attention" else KeyValueRows(self)

    def rounded(self, rows: int, length: int) -> tuple[int, int]:
        """Rows and entries that are reserved at least where so many are asked for."""
        return rows, length

    # --- rows

    def adopt(self, prefilled: Cache, lengths: Sequence[int]) -> None:
        """Append one row per entry of `lengths`, copied from a prefilled cache.

        Row `i` takes the cache's row `i`; where a layer was prefilled with one row, every new row takes that.
        """
        rows = slice(self.num_rows, self.num_rows + len(lengths))
        self._reserve(rows.stop, max([*self.lengths, *lengths]) + 1)
        for layer, source in zip(self.layers, prefilled.layers, strict=True):
            layer.adopt(rows, source)
        self.num_rows = rows.stop
        self.lengths.extend(lengths)

    def remove(self, row: int) -> None:
        """Drop a row; the last row takes its place."""
        last = self.num_rows - 1
        if row != last:
            for layer in self.layers:
                layer.move(last, row)
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        self.num_rows = last
        if not last:
            self._became_empty()

    def _became_empty(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Drop all rows and give their memory back."""
        self.num_rows, self.lengths, self.capacity, self._begun = 0, [], (0, 0), 0
        for layer in self.layers:
            layer.release()

    def _reserve(self, rows: int, length: int) -> None:
        """Room for `rows` rows of `length` entries: grows by half, shrinks when three quarters lie idle."""
        have_rows, have_length = self.capacity
        enough = rows <= have_rows and length <= have_length
        if enough and 4 * rows * max(length, LENGTH_STEP) >= have_rows * have_length:
            return
        if not enough:
            more_rows = have_rows if rows <= have_rows else max(rows, int(GROWTH * have_rows))
            more = have_length if length <= have_length else max(length, int(GROWTH * have_length))
            more = -(-more // LENGTH_STEP) * LENGTH_STEP
            if self.fits(more_rows, more):
                rows, length = more_rows, more
        self.capacity = (rows, length)
        for layer in self.layers:
            layer.resize(rows, length)

    # --- a step

    def begin(self, num_new: int = 1) -> Tensor:
        """Start a step that writes `num_new` entries at the end of every row; their positions `[B, T]`."""
        longest = max(self.lengths) + num_new
        # A step may begin twice, the second time with fewer entries: those that lie beyond are kept.
        self._begun = max(self._begun, longest)
        self._reserve(self.num_rows, self._begun)
        self.span = longest
        start = torch.tensor(self.lengths, dtype=torch.long)
        self.positions_BT = to_device(start[:, None] + torch.arange(num_new), self.device)
        self._show_rows(self.num_rows)
        return self.positions_BT

    def _show_rows(self, num_rows: int) -> None:
        self.rows_B1 = torch.arange(num_rows, device=self.device)[:, None]
        for layer in self.layers:
            if isinstance(layer, StateRows):
                layer.begin()

    def advance(self, num_new: Sequence[int] | int = 1) -> None:
        """Keep the step's entries: as many per row as given; what lies beyond is overwritten by the next step."""
        steps = [num_new] * self.num_rows if isinstance(num_new, int) else num_new
        self._begun = 0
        self.lengths = [length + step for length, step in zip(self.lengths, steps, strict=True)]

    def masks(self, dtype: torch.dtype) -> Tensor | dict[str, Tensor | None] | None:
        """What each new position may see, in the form the decoder takes: per kind of layer, or for all layers.

        Boolean `[B, 1, T, S]`, or additive where attention is eager. `None` where every row sees all entries.
        """
        kinds = set(self.kinds)
        made: dict[str, Tensor | None] = {kind: self._mask(kind, dtype) for kind in kinds}
        if getattr(self.config, "layer_types", None) is not None:
            return made
        return made[kinds.pop()]

    def _mask(self, kind: str, dtype: torch.dtype) -> Tensor | None:
        if kind == "linear_attention":
            return None
        window = self.config.sliding_window if kind == "sliding_attention" else None
        if self._sees_everything(window):
            return None
        entries_S = torch.arange(self.span, device=self.device)
        positions_BT1 = self.positions_BT[:, :, None]
        seen_BTS = entries_S <= positions_BT1
        if window is not None:
            seen_BTS &= entries_S > positions_BT1 - window
        seen = seen_BTS[:, None]
        if self.config._attn_implementation == "eager":
            return torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, torch.finfo(dtype).min)
        return seen

    def _sees_everything(self, window: int | None) -> bool:
        """Whether every new position sees all entries."""
        num_new = self.positions_BT.shape[1]
        same = min(self.lengths) + num_new == self.span
        return num_new == 1 and same and (window is None or self.span <= window)

    def extract(self, row: int, length: int) -> RowState:
        """A copy of a row's first `length` entries, and of the states it has reached."""
        entries: list[tuple[Tensor, Tensor] | None] = []
        states: States = []
        for layer in self.layers:
            if isinstance(layer, StateRows):
                entries.append(None)
                states.append({key: tensor[row].clone() for key, tensor in layer.rows().items()})
            else:
                kept = [t[row, :, :length].clone() for t in (layer.keys, layer.values) if t is not None]
                entries.append((kept[0], kept[1]) if kept else None)
                states.append(None)
        return RowState(entries, states)

    def snapshot(self) -> list[Any]:
        """Copies of all linear-attention states, which can't be cropped as keys and values can."""
        return [layer.snapshot() if isinstance(layer, StateRows) else None for layer in self.layers]

    def restore(self, states: list[Any], rows_B: Tensor | None = None) -> None:
        """Write linear-attention states back, everywhere or where `rows_B` is True."""
        for layer, state in zip(self.layers, states, strict=True):
            if isinstance(layer, StateRows):
                layer.restore(state, rows_B)

    def num_bytes(self) -> int:
        """Memory held by all layers."""
        return sum(layer.num_bytes() for layer in self.layers)
