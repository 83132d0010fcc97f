"""What the fused kernels of a GPU allocate, for estimates on machines without one: stand-ins with their inputs and outputs.

Without these kernels transformers runs linear attention step by step in plain PyTorch, which takes another amount of memory.
What is kept for the backward pass, and what the backward pass makes on the way, follows `flash-linear-attention` 0.4 and
`causal-conv1d` 1.5; attention needs no stand-in, because PyTorch's own runs fused on a CPU too.

Shape legend: B batch, L positions, N heads, K and V widths of a key and a value head, C positions of a chunk.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 64
DELTA_RULE, CONVOLUTION = "torch_chunk_gated_delta_rule", "causal_conv1d_fn"


class _DeltaRule(torch.autograd.Function):
    """The chunked gated delta rule: states of all chunks exist while a pass runs, and are made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        q, k = torch.empty_like(q), torch.empty_like(k)  # normalised
        inside = v.new_empty(*v.shape[:3], CHUNK)
        decay = torch.empty_like(g)
        _ = _pass(k, v)
        out = torch.empty_like(v)
        ctx.save_for_backward(q, k, v, decay, beta, inside)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        q, k, v, g, beta, _ = ctx.saved_tensors
        states = _pass(k, v)
        of_states = torch.empty_like(states[0])
        of_values = [torch.empty_like(v) for _ in range(2)]
        of_q, of_k, of_w = (_wide(k, v) for _ in range(3))
        del states, of_states
        of_inside = v.new_empty(*v.shape[:3], CHUNK, dtype=torch.float32)
        again = _wide(k, v), torch.empty_like(v)
        del of_inside, of_w, again, of_values[1]
        of_q, of_k = torch.empty_like(q), torch.empty_like(k)  # summed over the value heads that share one
        return of_q, of_k, of_values[0], torch.empty_like(g), torch.empty_like(beta)


def _wide(k: Tensor, v: Tensor) -> Tensor:
    """`[B, L, N, K]` for the heads of the values."""
    return k.new_empty(*v.shape[:3], k.shape[-1])


def _pass(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States `[B, L/C, N, K, V]`, both factors of the chunks, and the corrected values."""
    batch, length, heads, width = v.shape
    factors = _wide(k, v), torch.empty_like(v)
    states = v.new_empty(batch, -(-length // CHUNK), heads, k.shape[-1], width)
    return states, *factors, torch.empty_like(v)


class _Convolution(torch.autograd.Function):
    """The causal convolution with its activation: keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors)


def _delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    output_final_state: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    out = _DeltaRule.apply(query, key, value, g, beta)  # type: ignore[no-untyped-call]
    batch, _length, heads, width = value.shape
    shape = (batch, heads, key.shape[-1], width)
    return out, value.new_empty(shape, dtype=torch.float32) if output_final_state else None


def _convolution(hidden_states: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    return _Convolution.apply(hidden_states, weight)  # type: ignore[no-untyped-call,no-any-return]


@contextmanager
def fused_kernels(*models: nn.Module) -> Iterator[bool]:
    """While the body runs, the models' linear attention takes the memory that a GPU's kernels would; whether they have any.

    What is computed then means nothing: for fake tensors only.
    """
    homes = {sys.modules[type(module).__module__] for model in models for module in model.modules()}
    found = [(home, name) for home in homes for name in (DELTA_RULE, CONVOLUTION) if hasattr(home, name)]
    before = [getattr(home, name) for home, name in found]
    for home, name in found:
        setattr(home, name, _delta_rule if name == DELTA_RULE else _convolution)
    try:
        yield bool(found)
    finally:
        for (home, name), function in zip(found, before, strict=True):
            setattr(home, name, function)
