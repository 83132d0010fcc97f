"""The gated delta rule, token by token.

Shapes: T tokens of all sequences together, N sequences, S states, HV value heads, HK key heads, K and V widths of a key and a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64
"""Tokens between two states that SGLang may keep for its prefix cache."""


def run(
    q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor, beta: Tensor, states: Tensor, rows_N: Tensor, bounds: Tensor
) -> tuple[Tensor, Tensor]:
    """Run every sequence from its state, and leave its last state there.

    Args:
        q, k: `[T, HK, K]`, before their normalisation.
        v: `[T, HV, V]`.
        log_keep, beta: `[T, HV]`: the logarithm of what a state keeps, and the strength of what is written.
        states: `[S, HV, V, K]`; row `rows_N[n]` is sequence n's.
        bounds: `[N + 1]`, where each sequence begins and the last one ends.

    Returns:
        What is read, `[T, HV, V]` float32, and the state before every 64th token of each sequence, `[…, HV, V, K]`.
    """
    repeat = v.shape[1] // q.shape[1]
    q = _unit(q).repeat_interleave(repeat, 1) * q.shape[-1] ** -0.5
    k = _unit(k).repeat_interleave(repeat, 1)
    v, keep, beta = v.float(), log_keep.float().exp(), beta.float()
    output, marks = torch.zeros_like(v), []
    edges = bounds.tolist()
    for row, start, end in zip(rows_N.tolist(), edges[:-1], edges[1:], strict=False):
        state = states[row].float()
        for t in range(start, end):
            if (t - start) % CHUNK == 0:
                marks.append(state)
            state = state * keep[t][:, None, None]
            error = (v[t] - torch.einsum("hvk,hk->hv", state, k[t])) * beta[t][:, None]
            state = state + error[:, :, None] * k[t][:, None]
            output[t] = torch.einsum("hvk,hk->hv", state, q[t])
        if end > start:
            states[row] = state.to(states.dtype)
    return output, torch.stack(marks) if marks else states.new_zeros(0, *states.shape[1:]).float()


def _unit(x: Tensor) -> Tensor:
    """Each head's vector, at length 1."""
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) + 1e-6)
