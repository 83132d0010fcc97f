"""Attention of a step's few queries per row over a long cache, as two batched matrix products.

Each key and value is read once, by all query heads that share it, and the work spreads over the cache's length: what a GPU wants
of a step, where the usual kernels have one block per head. Prefills keep the family's own attention.

Shape legend: B rows, T queries per row, S cached entries, N key-value heads, G query heads for each, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import AttentionInterface

NAME = "pipo_rows"


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for `query [B, N·G, T, D]`, `key` and `value [B, N, S, D]`, bool `attention_mask [B, 1, T, S]`.

    Scores and their softmax are float32. Returns `[B, T, N·G, D]`.
    """
    b, heads, t, d = query.shape
    n, s = key.shape[1:3]
    query_MQD = query.reshape(b * n, heads // n * t, d)
    scores_MQS = _float32_product(query_MQD, key.reshape(b * n, s, -1).transpose(1, 2))
    scores = scores_MQS.view(b, heads, t, s) * (d**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(torch.float32).min)
    weights_MQS = scores.softmax(-1).to(value.dtype).view(b * n, -1, s)
    out = torch.bmm(weights_MQS, value.reshape(b * n, s, -1)).view(b, heads, t, -1)
    return out.transpose(1, 2), None


def _float32_product(left: Tensor, right: Tensor) -> Tensor:
    """A batched product in float32; a GPU takes it from narrower numbers without rounding the sums."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left, right).float()


AttentionInterface.register(NAME, row_attention)


@contextmanager
def attend_by_rows(config: PreTrainedConfig) -> Iterator[None]:
    """Let a decoder's attention be :func:`row_attention` inside, where it is torch's own; another is left as it is."""
    before = config._attn_implementation
    if before == "sdpa":
        config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
