"""A row cache whose buffers stay where they are, so that a captured step can be replayed on them.

Every layer of keys and values owns one flat buffer, seen as `[rows, N, capacity, D]`. Capacities and numbers of rows come from a
ladder of few sizes: a step that was captured for one of each is right whenever the cache has that capacity again. More rows
leave every entry where it is; another capacity lays the rows out anew in the same buffer. Only a buffer that is too small is
replaced, which `version` tells.

A step either works as on any :class:`RowCache`, or on the device alone (:meth:`StaticRowCache.on_device`): positions then come
from lengths that live on the device, and attention sees the whole capacity through a mask made of them.

Shape legend: B rows, R all rows, T new positions, S cached positions, N key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from pipo.model.cache import KeyValueRows, RowCache, StateRows
from pipo.model.sampling_batch import to_device

SMALLEST_CAPACITY = 256


def on_ladder(number: int, smallest: int) -> int:
    """The first of `smallest` × 1, 2, 3, 4, 6, 8, 12, 16, … that is no less than `number`."""
    size = smallest
    while size < number:
        if size > smallest and size * 3 // 2 >= number:
            return size * 3 // 2
        size *= 2
    return size


class _StaticKeyValueRows(KeyValueRows):
    """Keys and values as views `[rows, N, capacity, D]` of two flat buffers."""

    owner: StaticRowCache

    def __init__(self, owner: StaticRowCache) -> None:
        super().__init__(owner)
        self._flat: dict[str, Tensor] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate like the first keys and values seen: `[any, N, any, D]`."""
        for name, like in (("keys", key_states), ("values", value_states)):
            heads, width = like.shape[1], like.shape[3]
            self._flat[name] = like.new_zeros(self.owner.num_entries * heads * width)
            self._view(name, heads, width)

    def _view(self, name: str, heads: int, width: int) -> None:
        rows, capacity = self.owner.capacity
        flat = self._flat[name][: rows * heads * capacity * width]
        setattr(self, name, flat.view(rows, heads, capacity, width))

    def resize(self, rows: int, capacity: int) -> None:
        """See the buffers in another shape; running rows are kept, and copied only where the capacity changes."""
        for name, flat in self._flat.items():
            old: Tensor = getattr(self, name)
            heads, width = old.shape[1], old.shape[3]
            size = self.owner.num_entries * heads * width
            if size == flat.numel() and capacity == old.shape[2]:
                self._view(name, heads, width)
                continue
            kept = old[: self.owner.num_rows, :, :capacity].clone()
            # Zeros, as in any row cache: a masked entry is multiplied by zero, which does not cancel a NaN.
            self._flat[name] = flat.zero_() if size == flat.numel() else flat.new_zeros(size)
            self._view(name, heads, width)
            getattr(self, name)[: kept.shape[0], :, : kept.shape[2]] = kept

    def release(self) -> None:
        """Give the memory back."""
        super().release()
        self._flat.clear()

    def num_bytes(self) -> int:
        """Memory held."""
        return sum(flat.numel() * flat.element_size() for flat in self._flat.values())


class _StaticStateRows(StateRows):
    """Linear-attention states that move only where there are more rows than ever before."""

    owner: StaticRowCache

    def resize(self, rows: int, capacity: int) -> None:
        """Move to larger buffers where there are more rows."""
        if any(rows > tensor.shape[0] for tensor in self._all.values()):
            super().resize(rows, capacity)
            self.owner.version += 1


class StaticRowCache(RowCache):
    """A :class:`RowCache` for captured steps: fixed buffers, sizes off a ladder, lengths on the device too.

    Attributes:
        version: counts the times that a buffer was replaced; what was captured before must not be replayed.
        length_R: int64 on the device, entries of each row, as steps :meth:`on_device` find and leave them.
    """

    def __init__(self, config: PreTrainedConfig, device: torch.device) -> None:
        self.version = 0
        self.num_entries = 0
        """Entries that each layer's buffer has room for, of all rows together."""
        self.length_R = torch.zeros(0, dtype=torch.long, device=device)
        self._rows_on_device: int | None = None
        super().__init__(config, device)

    def new_layer(self, kind: str, number_of_states: int) -> Any:
        """The cache of one layer of this kind."""
        if kind == "linear_attention":
            return _StaticStateRows(self, number_of_states)
        return _StaticKeyValueRows(self)

    # --- sizes

    def rounded(self, rows: int, length: int) -> tuple[int, int]:
        """The next sizes on the ladder, within `limits`."""
        most_rows, longest = self.limits
        return min(on_ladder(rows, 1), most_rows), min(on_ladder(length, SMALLEST_CAPACITY), longest)

    def _reserve(self, rows: int, length: int) -> None:
        rows, length = self.rounded(rows, length)
        have_rows, have_length = self.capacity
        if length <= have_length < 2 * length and self._is_free(rows, have_length):
            length = have_length
        if (rows, length) == (min(rows, have_rows), have_length):
            return
        if rows * length > self.num_entries:
            more = -(-2 * self.num_entries // rows)
            self.num_entries = rows * max(length, more if self._is_free(rows, more) else 0)
            self.version += 1
        self.capacity = (rows, length)
        for layer in self.layers:
            layer.resize(rows, length)

    def _is_free(self, rows: int, length: int) -> bool:
        """Whether rows of this length take memory that is held already or may be had."""
        # `fits` knows of no row beyond the limit, and would let one pass.
        return rows * length <= self.num_entries or (length <= self.limits[1] and self.fits(rows, length))

    def clear(self) -> None:
        """Drop all rows and give their memory back."""
        super().clear()
        self.num_entries = 0
        self.version += 1

    def _became_empty(self) -> None:
        """The buffers stay: steps were captured on them."""

    # --- rows

    def remove(self, row: int) -> None:
        """Drop a row; the last row takes its place, on the device too."""
        last = self.num_rows - 1
        super().remove(row)
        if last < len(self.length_R):
            self.length_R[row] = self.length_R[last]
            self.length_R[last] = 0

    def load_lengths(self) -> None:
        """Tell the device how many entries the rows have. Rows that are not in use have none."""
        if len(self.length_R) < self.capacity[0]:
            self.length_R = torch.zeros(self.limits[0], dtype=torch.long, device=self.device)
            self.version += 1
        lengths = self.lengths + [0] * (len(self.length_R) - self.num_rows)
        self.length_R.copy_(to_device(torch.tensor(lengths, dtype=torch.long), self.device))

    # --- a step on the device

    def make_room(self, num_new: int) -> None:
        """Reserve `num_new` more entries of every row, before a step :meth:`on_device`."""
        self._reserve(self.num_rows, max(self.lengths) + num_new)

    @contextmanager
    def on_device(self, num_rows: int) -> Iterator[None]:
        """Steps inside take their positions from `length_R`, for the first `num_rows` rows, in use or not.

        :meth:`make_room` must have been called. Whoever steps moves `length_R` on.
        """
        self._rows_on_device = num_rows
        try:
            yield
        finally:
            self._rows_on_device = None

    def begin(self, num_new: int = 1) -> Tensor:
        """Start a step that writes `num_new` entries at the end of every row; their positions `[B, T]`."""
        if self._rows_on_device is None:
            return super().begin(num_new)
        self.span = self.capacity[1]
        new_T = torch.arange(num_new, device=self.device)
        self.positions_BT = self.length_R[: self._rows_on_device, None] + new_T
        self._show_rows(self._rows_on_device)
        return self.positions_BT

    def _sees_everything(self, window: int | None) -> bool:
        return self._rows_on_device is None and super()._sees_everything(window)
