"""The largest of many numbers by way of blocks: a pass over the vocabulary that takes each block's largest, then few entries.

Torch's own `topk` and `argmax` look at one number at a time on a CPU, and take ten times as long as reading them.

Shapes: B rows, V vocabulary, N blocks of W neighbouring entries, K kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

WIDTH = 128
"""W. It divides the vocabularies of Qwen3 and Qwen3.5; another is copied once, to fill its last block."""

_MIN_BLOCKS_PER_K = 4
"""Where the blocks that hold the largest are a good part of all, nothing is saved."""


_LONG_ROW = 16_384


class Largest(NamedTuple):
    """Entries of each row, and where they stand: int64."""

    values_BK: Tensor
    ids_BK: Tensor


def in_blocks(values_BV: Tensor, fill: float) -> Tensor:
    """`[B, N, W]`: the rows cut into blocks of neighbours, the last one filled up. A view where nothing is missing."""
    missing = -values_BV.shape[-1] % WIDTH
    if missing:
        values_BV = torch.nn.functional.pad(values_BV, (0, missing), value=fill)
    num_rows, size = values_BV.shape
    return values_BV.view(num_rows, size // WIDTH, WIDTH)


def block_of(blocks_BNW: Tensor, index_BK: Tensor) -> Tensor:
    """`[B, K, W]`: the named blocks of each row."""
    return blocks_BNW.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, blocks_BNW.shape[-1]))


def argmax(values_BV: Tensor) -> Tensor:
    """int64 `[B]`: the largest entry of each row, the first where several tie."""
    blocks_BNW = in_blocks(values_BV, -torch.inf)
    block_B1 = blocks_BNW.amax(-1).argmax(-1, keepdim=True)
    return block_B1.squeeze(1) * WIDTH + block_of(blocks_BNW, block_B1).squeeze(1).argmax(-1)


def pays(vocab_size: int, k: int) -> bool:
    """Whether the `k` largest are found faster by way of blocks."""
    return k * _MIN_BLOCKS_PER_K * WIDTH <= vocab_size


def largest(values_BV: Tensor, k: int) -> Largest:
    """The `k` largest entries of each row in descending order. Which of those that tie at the end are named is not said."""
    if k == 0 or not pays(values_BV.shape[-1], k):
        return Largest(*values_BV.topk(min(k, values_BV.shape[-1])))
    blocks_BNW = in_blocks(values_BV, -torch.inf)
    best_BK = blocks_BNW.amax(-1).topk(k).indices
    found = block_of(blocks_BNW, best_BK).flatten(1).topk(k)
    return Largest(found.values, best_BK.gather(1, found.indices // WIDTH) * WIDTH + found.indices % WIDTH)


def at_least_kth(values_BV: Tensor, k_B: Tensor, max_k: int) -> Largest | None:
    """Every entry that is at least the row's `k_B`-th largest, ties at it included, in the order of ids; rows with fewer hold more.

    Looks at the data, which would stall a GPU: for a CPU.

    Returns:
        `None` where entries that tie at the end may stand in more than `max_k` blocks.
    """
    blocks_BNW = in_blocks(values_BV, -torch.inf)
    maxima_BN = blocks_BNW.amax(-1)
    chosen_BK = maxima_BN.topk(max_k, sorted=False).indices.sort(-1).values
    near_BC = block_of(blocks_BNW, chosen_BK).flatten(1)
    kth_B1 = near_BC.topk(max_k).values.gather(1, (k_B.clamp(max=max_k) - 1).unsqueeze(1))
    if (maxima_BN >= kth_B1).sum(-1).max() > max_k:
        return None
    num = max(1, int((near_BC >= kth_B1).sum(-1).max()))  # of rows that are not numbers, something
    columns_BK = near_BC.topk(num, sorted=False).indices.sort(-1).values
    ids_BK = chosen_BK.gather(1, columns_BK // WIDTH) * WIDTH + columns_BK % WIDTH
    return Largest(near_BC.gather(1, columns_BK), ids_BK)


def row_by_row(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """`function` of all rows of `arguments`; on a CPU of one long row after the other, so that each stays in the processor's cache."""
    first = arguments[0]
    if first.device.type != "cpu" or len(first) < 2 or first.shape[-1] < _LONG_ROW:
        return function(*arguments)
    return torch.cat(
        [function(*row) for row in zip(*(torch.split(argument, 1) for argument in arguments), strict=True)]
    )
