"""A plugin that lets stock SGLang serve Qwen3.5 on a CPU with everything that its prefix cache does on a GPU. For tests.

SGLang loads it in every process. It does nothing unless SGLang was told to use the CPU (`SGLANG_USE_CPU_ENGINE=1`).
"""

from __future__ import annotations

import os

import torch
from torch import Tensor


def load() -> None:
    """Register the stand-in's operators, and replace what exists for GPUs only.

    Each replaced function is one that its own module looks up when it calls it: it does not matter who imported what before.
    """
    if os.environ.get("SGLANG_USE_CPU_ENGINE") != "1":
        return
    from sglang.kernels.ops.attention.fla import layernorm_gated
    from sglang.srt.arg_groups import choices
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    import sgl_kernel  # noqa: F401  (its import registers the operators)

    # SGLang asks for AMX here, and would run Triton without it.
    layernorm_gated._use_cpu = True
    for target, stand_in in {
        # Keeping states of linear attention beside the running one: the prefix cache and overlap scheduling need it together.
        "sglang.srt.arg_groups.mamba_hook._platform_supports_mamba_cache_extra_buffer": _always,
        "sglang.kernels.ops.mamba.mamba_state_scatter_triton._launch_track_mamba_states": _keep_states,
        # The shared expert of Qwen3.5's mixture.
        "sglang.kernels.ops.elementwise.elementwise._launch_fused_gate_sigmoid_mul": _gate_shared_expert,
        # xgrammar applies its masks on a CPU, but one of SGLang's two ways to ask for that knows GPUs only.
        "sglang.srt.constrained.xgrammar_backend.XGrammarGrammarBackend.apply_vocab_mask": _apply_vocab_mask,
        # Seeded draws, and the arithmetic that makes a GPU's independent of the batch.
        "sglang.srt.model_executor.model_runner.ModelRunner.maybe_enable_batch_invariant_mode": _nothing,
        "sglang.srt.layers.sampler.multinomial_with_seed": _draw_seeded,
        # A CPU's memory cannot be pinned for a GPU that is not there.
        "torch.Tensor.pin_memory": _unpinned,
    }.items():
        HookRegistry.register(target, stand_in, HookType.REPLACE)
    choices.add_deterministic_attention_backend_choices(["torch_native"])


def _always() -> bool:
    return True


def _nothing(*args: object) -> None:
    pass


def _unpinned(tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
    return tensor


def _keep_states(
    conv: Tensor, ssm: Tensor, source_N: Tensor, mask_N: Tensor, target_N: Tensor, num_rows: int, num_layers: int,
    conv_strides: tuple[int, int], ssm_strides: tuple[int, int], conv_size: int, ssm_size: int, check_freed_slots: bool,
) -> None:  # fmt: skip
    """Copy the marked sequences' states, of all layers or one, to where the prefix cache will look for them.

    `conv`, `ssm`: `[layers, rows, …]`, or `[rows, …]` with a layer stride of 0.
    """
    if check_freed_slots:
        raise NotImplementedError("the stand-in does not know SGLang's unified memory")
    marked = mask_N[:num_rows]
    source, target = source_N[:num_rows][marked].long(), target_N[:num_rows][marked].long()
    for states, (layer_stride, _) in ((conv, conv_strides), (ssm, ssm_strides)):
        layers = states if layer_stride else states[None]
        layers[:, target] = layers[:, source]


def _gate_shared_expert(
    hidden_TD: Tensor, weight_D: Tensor, shared_TD: Tensor, output_TD: Tensor, *, do_add: bool
) -> None:
    """The shared expert's output times `sigmoid(hidden · weight)`, written or added to `output_TD`."""
    gated = torch.sigmoid((hidden_TD.float() * weight_D.float()).sum(-1, keepdim=True)) * shared_TD
    output_TD.copy_(output_TD + gated if do_add else gated)


def _apply_vocab_mask(logits: Tensor, vocab_mask: Tensor) -> None:
    """Forbid what `vocab_mask`, a bit per token, does not allow."""
    from xgrammar import apply_token_bitmask_inplace

    apply_token_bitmask_inplace(logits, vocab_mask)


def _draw_seeded(logprobs_BV: Tensor, seed_B: Tensor, position_B: Tensor) -> Tensor:
    """`[B, 1]`: a draw that hangs on the row's seed and position alone."""
    noise = [
        torch.rand(logprobs_BV.shape[1], generator=torch.Generator().manual_seed(seed * 1_000_003 + position))
        for seed, position in zip(seed_B.tolist(), position_B.tolist(), strict=True)
    ]
    return (logprobs_BV - (-torch.stack(noise).log()).log()).argmax(-1, keepdim=True)
