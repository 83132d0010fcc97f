"""Prefill: prompts through the backbone and, over all their positions, through the MTP block. Section 3.3.

Shape legend: B rows, L positions (pairs, or tokens of a regular model), T slots, H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from pipo.model.backbone import LayerCall
from pipo.model.drafter import Drafter
from pipo.model.modeling import PipoForCausalLM
from pipo.model.row_state import States, prefill_cache, prefill_states
from pipo.pairing import MTP_INPUTS


@dataclass
class Prefilled:
    """Prompts that went through the backbone: right-padded rows, of which only `lengths` positions count."""

    model: Drafter
    cache: Cache
    hidden_BLH: Tensor
    call: LayerCall
    following_BL: Tensor
    """What the MTP block reads at each position: the token 1 that follows it. The last one is not known yet."""
    lengths: list[int]
    """Positions in the cache, per row."""
    offset: int = 0
    """Positions that were in the cache before; `hidden_BLH` starts after them."""

    @property
    def last_hidden_BH(self) -> Tensor:
        """`h` of each prompt's last position."""
        return self.hidden_BLH[range(len(self.lengths)), self._last]

    @property
    def _last(self) -> list[int]:
        return [length - self.offset - 1 for length in self.lengths]

    def share(self, num_rows: int) -> None:
        """Let one prefilled prompt serve `num_rows` samples."""
        assert len(self.lengths) == 1
        self.hidden_BLH = self.hidden_BLH.expand(num_rows, -1, -1)
        self.following_BL = self.following_BL.repeat(num_rows, 1)
        self.lengths = self.lengths * num_rows
        mtp_layer = self.cache.layers[-1]  # the backbone is done with its own; the MTP block goes on with all rows
        if isinstance(mtp_layer, DynamicLayer) and mtp_layer.is_initialized:
            mtp_layer.batch_repeat_interleave(num_rows)

    def run_mtp(self, token1_B: Tensor) -> Tensor:
        """Run the MTP block over **all** positions, which fills its cache; `d [B, H]` of each prompt's last one."""
        rows, last = range(len(self.lengths)), self._last
        self.following_BL[rows, last] = token1_B
        mtp_hidden_BLH = self.model.run_mtp(self.following_BL, self.hidden_BLH, self.call, self.cache)
        return mtp_hidden_BLH[rows, last]


def resume_pairs(
    model: PipoForCausalLM, slots: Sequence[int], cache: Cache, done: int, keep_at: int | None = None
) -> tuple[Prefilled, States | None]:
    """Run the backbone over one prompt whose first `done` pairs are in `cache`, MTP block included.

    Args:
        slots: of the whole prompt. keep_at: stop at this many pairs on the way and return the linear-attention states there.
    """
    kept: States | None = None
    if keep_at is not None:
        part = _prefill_from(model, slots[: 2 * keep_at + 2], cache, done, keep_at)
        model.run_mtp(part.following_BL, part.hidden_BLH, part.call, cache)
        kept, done = prefill_states(cache), keep_at
    return _prefill_from(model, slots, cache, done, len(slots) // 2), kept


def _prefill_from(model: PipoForCausalLM, slots: Sequence[int], cache: Cache, done: int, end: int) -> Prefilled:
    """Pairs `done … end-1`. `slots` may go on: the slot after the last pair is what the MTP block reads there."""
    ids = torch.tensor([[*slots, 0]], dtype=torch.long, device=model.device)
    slots_1T, following_1L = ids[:, 2 * done : 2 * end], ids[:, 2 * done + 2 : 2 * end + 1 : 2]
    positions_1L = torch.arange(done, end, device=model.device)[None]
    hidden_1LH, call = model.run_backbone(model.compress(slots_1T), positions_1L, None, cache)
    return Prefilled(model, cache, hidden_1LH, call, following_1L.clone(), [end], offset=done)


def prefill_pairs(model: PipoForCausalLM, slots: Sequence[Sequence[int]]) -> Prefilled:
    """Run the backbone over prompts given as slots (each of even length, not empty)."""
    longest = max(len(row) for row in slots)
    padded = [[*row, *[0] * (longest - len(row))] for row in slots]
    slots_BT = torch.tensor(padded, dtype=torch.long, device=model.device)
    following_BL = torch.cat([slots_BT[:, MTP_INPUTS], slots_BT[:, :1]], dim=1)
    return _prefill(model, model.compress(slots_BT), following_BL, [len(row) // 2 for row in slots])


def prefill_tokens(model: Drafter, prompts: Sequence[Sequence[int]], device: torch.device) -> Prefilled:
    """Run a regular model's backbone over prompts of tokens."""
    longest = max(len(row) for row in prompts)
    ids_BT = torch.tensor([[*row, *[0] * (longest - len(row))] for row in prompts], dtype=torch.long, device=device)
    return _prefill(model, model.embed(ids_BT), ids_BT.roll(-1, dims=1), [len(row) for row in prompts])


def _prefill(model: Drafter, inputs_BLH: Tensor, following_BL: Tensor, lengths: list[int]) -> Prefilled:
    # Rows end in padding, which no earlier position attends to: the decoder's own causal masks are all it takes.
    cache = prefill_cache(model.backbone.config)
    positions_1L = torch.arange(inputs_BLH.shape[1], device=inputs_BLH.device)[None]
    hidden_BLH, call = model.run_backbone(inputs_BLH, positions_1L, None, cache)
    return Prefilled(model, cache, hidden_BLH, call, following_BL, lengths)
