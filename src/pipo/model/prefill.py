"""Prefill: prompts through the backbone and, over all their positions, through the MTP block. Section 3.3.

Shape legend: B rows, L positions (pairs, or tokens of a regular model), T slots (or tokens), H width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from pipo.model.backbone import LayerCall
from pipo.model.base import BaseForCausalLM
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
        """Run the MTP block over the positions that it has not seen, which fills its cache; `d [B, H]` of each prompt's last one."""
        rows, last = range(len(self.lengths)), self._last
        self.following_BL[rows, last] = token1_B
        mtp_hidden_BLH = self.model.run_mtp(self.following_BL, self.hidden_BLH, self.call, self.cache)
        return mtp_hidden_BLH[rows, last]


class Prefill:
    """Prompts on their way through the model: several in one go, right-padded; a single one in parts as long as asked for.

    What the MTP block reads beside a position is the token 1 that follows. For all but the last position that is in the prompt,
    so each part but the last goes through the MTP block at once and leaves nothing behind but the cache.
    """

    def __init__(
        self,
        model: PipoForCausalLM | BaseForCausalLM,
        prompts: Sequence[Sequence[int]],
        *,
        cache: Cache | None = None,
        num_cached: int = 0,
        num_samples: int = 1,
        drafts: bool = True,
        keep_at: int | None = None,
    ) -> None:
        """Ready to read `prompts`: slots (of even length, none empty) for a PIPO model, tokens for a regular one.

        Args:
            cache: of the one prompt's first `num_cached` positions; filled further.
            num_samples: how many will share the one prompt. Each has a token 1 of its own, so the last position is then read by itself.
            drafts: whether the MTP block will be run. keep_at: keep the linear-attention states after so many positions.
        """
        longest = max(len(row) for row in prompts)
        # Rows end in padding, which no earlier position attends to: the decoder's own causal masks are all it takes.
        padded = [[*row, *[0] * (longest - len(row))] for row in prompts]
        ids_BT = self._ids_BT = torch.tensor(padded, dtype=torch.long, device=model.device)
        self._embed: Callable[[Tensor], Tensor]
        if isinstance(model, PipoForCausalLM):
            self._width, self._embed, following_BL = 2, model.compress, ids_BT[:, MTP_INPUTS]
        else:
            self._width, self._embed, following_BL = 1, model.embed, ids_BT[:, 1:]
        self._following_BL = torch.cat([following_BL, ids_BT[:, :1]], dim=1)  # the last one is not known yet
        self.model = model
        self.cache = prefill_cache(model.backbone.config) if cache is None else cache
        self.lengths = [len(row) // self._width for row in prompts]
        self.num_cached = self.done = num_cached
        self.drafts = drafts
        self.keep_at = keep_at
        self.kept: States | None = None
        """The states that were to be kept, once it has come so far."""
        self.result: Prefilled | None = None
        """What the last part gave, once all is read."""
        cuts = {keep_at, max(self.lengths) - 1 if num_samples > 1 else None}
        self._cuts = {cut for cut in cuts if cut is not None}

    @property
    def left(self) -> int:
        """Positions still to be read, of the longest prompt."""
        return max(self.lengths) - self.done

    def advance(self, num_positions: int | None = None) -> None:
        """Read on: so many positions, or all that are left."""
        end = self.done + (self.left if num_positions is None else min(num_positions, self.left))
        for stop in sorted({*self._cuts, end}):
            if self.done < stop <= end:
                self._read(stop)

    def finish(self) -> Prefilled:
        """Read all that is left."""
        self.advance()
        assert self.result is not None
        return self.result

    def _read(self, stop: int) -> None:
        assert len(self.lengths) == 1 or stop == max(self.lengths), "several prompts are read in one go"
        positions_1L = torch.arange(self.done, stop, device=self._ids_BT.device)[None]
        inputs_BLH = self._embed(self._ids_BT[:, self._width * self.done : self._width * stop])
        hidden_BLH, call = self.model.run_backbone(inputs_BLH, positions_1L, None, self.cache)
        following_BL = self._following_BL[:, self.done : stop]
        if stop == max(self.lengths):
            following_BL = following_BL.clone()  # token 1 will be written into it
            self.result = Prefilled(
                self.model, self.cache, hidden_BLH, call, following_BL, self.lengths, offset=self.done
            )
        elif self.drafts:
            self.model.run_mtp(following_BL, hidden_BLH, call, self.cache)
        self.done = stop
        if stop == self.keep_at:
            self.kept = prefill_states(self.cache)
