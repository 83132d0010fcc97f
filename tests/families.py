"""Tiny random models of every family that is proved, made on the spot."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from pipo import BaseForCausalLM, PipoConfig, PipoForCausalLM

VOCAB, PAD, EOS = 160, 0, 2
WINDOW = 8

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
_HEAD: dict[str, Any] = dict(_COMMON, head_dim=16)
_LINEAR: dict[str, Any] = dict(
    _HEAD,
    linear_conv_kernel_dim=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    layer_types=["linear_attention"] * 3 + ["full_attention"],
)
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SLIDING = ["sliding_attention", "full_attention"] * 2


def config_of(family: str, **changes: Any) -> PreTrainedConfig:
    """A tiny config; sliding windows are 8 positions, so that short texts reach beyond twice the window."""
    makers: dict[str, Any] = {
        "qwen3_5": lambda: Qwen3_5TextConfig(**_LINEAR),
        "qwen3_5_moe": lambda: Qwen3_5MoeTextConfig(**_LINEAR, **_MOE, shared_expert_intermediate_size=32),
        "qwen3_next": lambda: Qwen3NextConfig(
            **_LINEAR, **_MOE, shared_expert_intermediate_size=32, decoder_sparse_step=1, mlp_only_layers=[]
        ),
        "qwen3": lambda: Qwen3Config(**_HEAD),
        "qwen3_tied": lambda: Qwen3Config(**_HEAD, tie_word_embeddings=True),
        "qwen3_moe": lambda: Qwen3MoeConfig(**_HEAD, **_MOE),
        "qwen2": lambda: Qwen2Config(**_COMMON),
        "llama": lambda: LlamaConfig(**_HEAD),
        "mistral": lambda: MistralConfig(**_HEAD, sliding_window=WINDOW),
        "gemma2": lambda: Gemma2Config(**_HEAD, sliding_window=WINDOW, query_pre_attn_scalar=16),
        "gemma3": lambda: Gemma3TextConfig(
            **_HEAD, sliding_window=WINDOW, query_pre_attn_scalar=16, layer_types=_SLIDING
        ),
        "granite": lambda: GraniteConfig(
            **_COMMON, logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.2
        ),
        "gpt_oss": lambda: GptOssConfig(
            **_HEAD, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW, layer_types=_SLIDING
        ),
        "cohere2": lambda: Cohere2Config(**_HEAD, logit_scale=0.3, sliding_window=WINDOW, layer_types=_SLIDING),
    }
    config: PreTrainedConfig = makers[family]()
    config.update(changes)
    return config


FAMILIES = [
    "qwen3_5", "qwen3_5_moe", "qwen3_next", "qwen3", "qwen3_tied", "qwen3_moe", "qwen2", "llama", "mistral", "gemma2",
    "gemma3", "granite", "gpt_oss", "cohere2",
]  # fmt: skip


def shake(model: torch.nn.Module, seed: int) -> None:
    """Move every weight away from its start, so that no part is a zero or a copy, and logits differ clearly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() >= 2:
                scale = 0.5 if "embed_tokens" in name else 1.2 / parameter.shape[-1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def pipo_model(
    family: str, compressor: str = "mlp", seed: int = 0, gate: str = "hidden", **changes: Any
) -> PipoForCausalLM:
    torch.manual_seed(seed)
    config = PipoConfig(config_of(family, **changes), compressor_type=compressor, confidence_features=gate)
    model = PipoForCausalLM(config)
    shake(model, seed)
    return model.eval()


def base_model(family: str, seed: int = 0) -> BaseForCausalLM:
    torch.manual_seed(seed)
    model = BaseForCausalLM.from_config(config_of(family))
    shake(model, seed)
    return model.eval()
