"""A stand-in for `sgl_kernel`, which is published for GPUs only: the operators that SGLang calls on a CPU without AMX.

Plain PyTorch, slow and obvious, float32 inside, written from what each operator is for. SGLang finds them as
`torch.ops.sgl_kernel.NAME` or by importing a name from here. An operator that none of the tested models needs is not
there, or raises when it is called: nothing is answered wrongly.

Shapes: T tokens of all sequences together, N sequences, D channels, H heads, HV value heads, HK key heads,
K width of a key head, V width of a value head, W width of the convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_kernel import recurrence

_LIBRARY = torch.library.Library("sgl_kernel", "DEF")


def operator(*changes: str) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Make a function an operator `torch.ops.sgl_kernel.NAME`; `changes` names the arguments that it writes into."""

    def register(function: Callable[..., object]) -> Callable[..., object]:
        name = function.__name__
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=changes))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return function

    return register


# --- names that SGLang imports from here ------------------------------------------------------------------------


def assign_req_to_token_pool_cpu(
    rows_N: Tensor, table: Tensor, starts_N: Tensor, ends_N: Tensor, slots_T: Tensor, width: int
) -> None:
    """Write each sequence's new cache slots into its row of the table, from its start to its end."""
    at = 0
    for row, start, end in zip(rows_N.tolist(), starts_N.tolist(), ends_N.tolist(), strict=True):
        table[row, start:end] = slots_T[at : at + end - start].to(table.dtype)
        at += end - start


def __getattr__(name: str) -> Callable[..., NoReturn]:
    """A name that SGLang imports without calling it here: those of speculative decoding."""
    if not name.endswith("_cpu"):
        raise AttributeError(f"the stand-in for sgl_kernel has no {name!r}")

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} has no stand-in for a CPU")

    return refuse


# --- attention of Qwen3.5 ----------------------------------------------------------------------------------------


def _gemma_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, times `1 + weight`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * (1 + weight.float())).to(x.dtype)


@operator()
def fused_qk_gemma_rmsnorm_cpu(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, head_dim: int
) -> tuple[Tensor, Tensor]:
    """Queries and keys `[T, H·K]`, normalised by heads: `[T·H, K]` each."""
    return _gemma_norm(q.reshape(-1, head_dim), q_weight, eps), _gemma_norm(k.reshape(-1, head_dim), k_weight, eps)


@operator()
def fused_qk_gemma_rmsnorm_with_gate_cpu(
    q_gate: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, head_dim: int, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, where each query head `[2K]` holds its query, then its gate: `(q, k, gate)`."""
    q, gate = q_gate.reshape(-1, num_heads, 2 * head_dim).split(head_dim, dim=-1)
    normed = (
        _gemma_norm(q.reshape(-1, head_dim), q_weight, eps),
        _gemma_norm(k.reshape(-1, head_dim), k_weight, eps),
    )
    return *normed, gate.clone(memory_format=torch.contiguous_format)


@operator("x")
def fused_sigmoid_mul_cpu(x: Tensor, gate: Tensor) -> None:
    """`x *= sigmoid(gate)`, in place."""
    x.mul_(torch.sigmoid(gate.float()).to(x.dtype).view(x.shape))


# --- linear attention of Qwen3.5 ---------------------------------------------------------------------------------


@operator()
def fused_qkvzba_split_reshape_cat_contiguous_cpu(
    qkvz: Tensor, ba: Tensor, num_k_heads: int, num_v_heads: int, k_dim: int, v_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two projections taken apart: queries, keys and values together `[T, 2·HK·K + HV·V]`, z `[T, HV, V]`, b and a `[T, HV]`."""
    values = num_v_heads * v_dim
    qkv, z = qkvz.split([2 * num_k_heads * k_dim + values, values], dim=-1)
    b, a = ba.split(num_v_heads, dim=-1)
    return qkv.clone(), z.reshape(-1, num_v_heads, v_dim).clone(), b.clone(), a.clone()


@operator()
def fused_gdn_gating_cpu(A_log: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of what a state keeps, and the strength of what is written: `[1, T, HV]` each."""
    keep = -A_log.float().exp() * F.softplus(a.float() + dt_bias.float())
    return keep[None], torch.sigmoid(b.float()).to(b.dtype)[None]


@operator("initial_state_source")
def fused_sigmoid_gating_delta_rule_update_cpu(
    A_log: Tensor, dt_bias: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor,
    initial_state_source: Tensor, initial_state_indices: Tensor, cu_seqlens: Tensor,
    use_qk_l2norm_in_kernel: bool, softplus_beta: float, softplus_threshold: float,
) -> Tensor:  # fmt: skip
    """One decoding step of the gated delta rule for every sequence: `[1, T, HV, V]`; the states are updated in place."""
    if not use_qk_l2norm_in_kernel or (softplus_beta, softplus_threshold) != (1.0, 20.0):
        raise NotImplementedError("the stand-in normalises queries and keys, and knows the usual softplus only")
    value_heads = v.shape[-2]
    log_keep, beta = fused_gdn_gating_cpu(A_log, a.reshape(-1, value_heads), b.reshape(-1, value_heads), dt_bias)
    output, _ = recurrence.run(
        q[0], k[0], v[0], log_keep[0], beta[0], initial_state_source, initial_state_indices, cu_seqlens
    )
    return output[None].to(v.dtype)


@operator()
def fused_rmsnorm_gated_cpu(x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    """RMSNorm times the weight, times `silu(gate)`."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()
    return (normed * F.silu(gate.float())).to(x.dtype)


# --- sampling with a seed ----------------------------------------------------------------------------------------

_BITS = 0xFFFFFFFF


def _rotate(x: Tensor, by: int) -> Tensor:
    return ((x << by) | (x >> (32 - by))) & _BITS


def _mix(state: Tensor, block: Tensor) -> Tensor:
    """One round of MurmurHash3 on 32-bit blocks, in int64 without overflow."""
    block = _rotate(_times(block & _BITS, 0xCC9E2D51), 15)
    return (_rotate(state ^ _times(block, 0x1B873593), 13) * 5 + 0xE6546B64) & _BITS


def _times(x: Tensor, factor: int) -> Tensor:
    """`x · factor` modulo 2³², for x below 2³²: by halves, so that no product reaches 2⁶³."""
    return (((x >> 16) * factor << 16 & _BITS) + (x & 0xFFFF) * factor) & _BITS


@operator()
def murmur_hash32_cpu(seed: Tensor, positions: Tensor, col_indices: Tensor) -> Tensor:
    """MurmurHash3 of (seed, position, column): `[N, columns]` uint32. `seed` is uint64."""
    seed_N1 = seed.view(torch.int64)[:, None]
    state = torch.zeros(len(seed), len(col_indices), dtype=torch.int64)
    for block in (seed_N1, seed_N1 >> 32, positions.long()[:, None], col_indices.long()[None]):
        state = _mix(state, block)
    state = state ^ 16
    state = _times(state ^ (state >> 16), 0x85EBCA6B)
    state = _times(state ^ (state >> 13), 0xC2B2AE35)
    return (state ^ (state >> 16)).to(torch.uint32)
