"""Models with random weights, made where and as they are used: no float32 copy, nothing drawn number by number."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from pipo.kernels.pages import gather
from pipo.model.backbone import build_causal_lm

M = TypeVar("M", bound=nn.Module)

BLOCK = 1_000_003
"""Random numbers that all matrices repeat. A prime, so that no two rows of a matrix are alike."""
DEFAULT_STD = 0.02


@torch.no_grad()
def random_causal_lm(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Any:
    """A regular model of `config` with random weights; the same for the same seed, dtype and kind of device."""
    with no_init_weights(), device:
        causal_lm: Any = build_causal_lm(config, dtype)
    causal_lm.tie_weights()
    generator = torch.Generator(device).manual_seed(seed)
    std = float(getattr(config, "initializer_range", DEFAULT_STD))
    block = torch.empty(BLOCK, dtype=dtype, device=device).normal_(0.0, std, generator=generator)
    for name, weight in causal_lm.named_parameters():
        if weight.dim() > 1:
            _repeat(block, weight)
        elif name.endswith("bias"):
            weight.zero_()  # other vectors, such as norms, have the values that their modules start with
    gather(causal_lm.parameters())  # as the engine does with a checkpoint's
    return causal_lm.eval().requires_grad_(False)


def _repeat(block: Tensor, weight: Tensor) -> None:
    flat = weight.view(-1)
    whole = len(flat) // len(block) * len(block)
    flat[:whole].view(-1, len(block)).copy_(block)
    flat[whole:].copy_(block[: len(flat) - whole])


def sharing_weights(model: M) -> M:
    """The same model as modules of its own, around the same weights: what is done to one's modules leaves the other as it is."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
