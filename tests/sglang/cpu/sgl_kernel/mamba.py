"""The short convolution and the prefill of linear attention, under the names that SGLang imports.

Shapes as in the package. A convolution's state holds the last W - 1 inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_kernel import recurrence


def causal_conv1d_fn_cpu(
    x_DT: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    *,
    activation: str | None,
    conv_states: Tensor,
    has_initial_state: Tensor,
    cache_indices: Tensor,
    query_start_loc: Tensor,
    seq_lens_cpu: list[int] | None = None,
) -> Tensor:
    """Convolve every sequence of a prefill, from its state where it has one: `[D, T]`; the states are updated in place."""
    output = torch.empty_like(x_DT)
    edges, carried = query_start_loc.tolist(), has_initial_state.tolist()
    for n, row in enumerate(cache_indices.tolist()):
        part = slice(edges[n], edges[n + 1])
        if part.start == part.stop:
            continue
        before = conv_states[row] if carried[n] else torch.zeros_like(conv_states[row])
        inputs = torch.cat([before.to(x_DT.dtype), x_DT[:, part]], 1)
        convolved = F.conv1d(inputs.float()[None], weight_DW.float()[:, None], bias_D, groups=len(inputs))[0]
        output[:, part] = _activate(convolved, activation).to(x_DT.dtype)
        conv_states[row] = inputs[:, 1 - weight_DW.shape[-1] :].to(conv_states.dtype)
    return output


def causal_conv1d_update_cpu(
    x_ND: Tensor,
    conv_states: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    activation: str | None,
    *,
    conv_state_indices: Tensor,
) -> Tensor:
    """Convolve one new input of every sequence: `[N, D]`; the states are updated in place."""
    rows = conv_state_indices.long()
    inputs = torch.cat([conv_states[rows].to(x_ND.dtype), x_ND[:, :, None]], -1)
    convolved = (inputs.float() * weight_DW.float()).sum(-1)
    if bias_D is not None:
        convolved = convolved + bias_D.float()
    conv_states[rows] = inputs[:, :, 1:].to(conv_states.dtype)
    return _activate(convolved, activation).to(x_ND.dtype)


def chunk_gated_delta_rule_cpu(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor,
    head_first: bool,
    use_qk_l2norm_in_kernel: bool,
    initial_state_indices: Tensor,
) -> tuple[Tensor, None, Tensor]:
    """Prefill of linear attention: what is read `[1, T, HV, V]`, nothing, and the states between chunks, first dimension 1."""
    if head_first or not use_qk_l2norm_in_kernel:
        raise NotImplementedError("the stand-in takes tokens first, and normalises queries and keys")
    output, marks = recurrence.run(q[0], k[0], v[0], g[0], beta[0], initial_state, initial_state_indices, cu_seqlens)
    return output[None].to(v.dtype), None, marks[None]


def _activate(x: Tensor, name: str | None) -> Tensor:
    if name in ("silu", "swish"):
        return F.silu(x)
    if name is None:
        return x
    raise NotImplementedError(f"the stand-in's convolution has no activation {name!r}")
