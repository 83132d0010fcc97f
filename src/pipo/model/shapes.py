"""Shapes of well-known models, for plans and benchmarks that must not download anything: sizes only, never weights.

Each shape is a transformers config; what it does not say is the family's default. Sources are named beside each group. A test
compares the parameters that they give with the published counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from pipo.errors import ConfigError
from pipo.model.backbone import build_causal_lm
from pipo.model.base import BaseForCausalLM
from pipo.model.config import PipoConfig, family_config
from pipo.model.modeling import PipoForCausalLM


@dataclass(frozen=True)
class Shape:
    """A model's sizes: the fields of its text config, and the checkpoint that has them."""

    fields: Mapping[str, Any]
    checkpoint: str


# The `text_config` of each checkpoint's config.json; 9B is also the default of transformers' Qwen3_5TextConfig. A quarter of the layers
# is full attention. Heads of the linear layers: 16 for keys, and for values as below, 128 wide each.
_QWEN3_5 = {
    "model_type": "qwen3_5_text",
    "vocab_size": 248_320,
    "head_dim": 256,
    "max_position_embeddings": 262_144,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25},
    "pad_token_id": 248_044,
    "eos_token_id": 248_044,
}


def _qwen3_5(size: str, width: int, inner: int, layers: int, heads: int, kv: int, values: int, tied: bool) -> Shape:
    fields = {
        **_QWEN3_5,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "linear_num_value_heads": values,
        "tie_word_embeddings": tied,
    }
    return Shape(fields, f"Qwen/Qwen3.5-{size}")


# config.json of each checkpoint. Heads are 128 wide, 8 of them for keys and values.
def _qwen3(size: str, width: int, inner: int, layers: int, heads: int, tied: bool) -> Shape:
    fields = {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": tied,
        "pad_token_id": 151_643,
        "eos_token_id": 151_645,
    }
    return Shape(fields, f"Qwen/Qwen3-{size}")


# config.json of each checkpoint.
def _llama(size: str, width: int, inner: int, layers: int, heads: int, head_dim: int, tied: bool) -> Shape:
    fields = {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": tied,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
    }
    return Shape(fields, f"meta-llama/Llama-{size}")


# For benchmarks on a CPU; no checkpoints are published. `tiny` is the demo's model.
def _tiny(family: str, width: int, layers: int, vocab_size: int, **more: Any) -> Shape:
    fields = {
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": round(width * 8 / 3 / 32) * 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": width // 4,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        **more,
    }
    return Shape(fields, "none")


_LINEAR = {
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}

SHAPES: dict[str, Shape] = {
    "qwen3.5-0.8b": _qwen3_5("0.8B", 1024, 3584, 24, 8, 2, 16, tied=True),
    "qwen3.5-2b": _qwen3_5("2B", 2048, 6144, 24, 8, 2, 16, tied=True),
    "qwen3.5-4b": _qwen3_5("4B", 2560, 9216, 32, 16, 4, 32, tied=True),
    "qwen3.5-9b": _qwen3_5("9B", 4096, 12_288, 32, 16, 4, 32, tied=False),
    "qwen3.5-27b": _qwen3_5("27B", 5120, 17_408, 64, 24, 4, 48, tied=False),
    "qwen3-0.6b": _qwen3("0.6B", 1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3("1.7B", 2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3("4B", 2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3("8B", 4096, 12_288, 36, 32, tied=False),
    "llama-3.2-1b": _llama("3.2-1B", 2048, 8192, 16, 32, 64, tied=True),
    "llama-3.1-8b": _llama("3.1-8B", 4096, 14_336, 32, 32, 128, tied=False),
    "tiny": _tiny("qwen3", 128, 6, 384, max_position_embeddings=512),
    "tiny-wide": _tiny("qwen3", 512, 4, 32_000),
    "tiny-hybrid": _tiny("qwen3_5_text", 512, 4, 32_000, **_LINEAR),
}


def shape_config(name: str) -> PreTrainedConfig:
    """The backbone's config of a named shape.

    Raises:
        ConfigError: no such shape; the message lists them.
    """
    shape = SHAPES.get(name.lower())
    if shape is None:
        raise ConfigError(f"there is no shape {name!r}; the shapes are {', '.join(SHAPES)}")
    return family_config(dict(shape.fields))


def shape_of_checkpoint(path_or_id: str) -> str | None:
    """The name of the shape of a published checkpoint, by its hub id; None where it is not in the table."""
    return next((name for name, shape in SHAPES.items() if shape.checkpoint.lower() == path_or_id.lower()), None)


def pipo_without_weights(
    config: PreTrainedConfig, compressor: str = "mlp", dtype: torch.dtype | None = None, attention: str | None = None
) -> PipoForCausalLM:
    """A PIPO model around a regular model's config whose parameters have shapes and dtypes but no storage (device `meta`)."""
    with no_init_weights(), torch.device("meta"):
        causal_lm = build_causal_lm(config, dtype, attention)
        return PipoForCausalLM(PipoConfig(config, compressor_type=compressor), causal_lm=causal_lm, initialise=False)


def base_without_weights(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> BaseForCausalLM:
    """A regular model of a config, without an MTP block, on device `meta`."""
    with no_init_weights(), torch.device("meta"):
        causal_lm: Any = build_causal_lm(config, dtype)
    causal_lm.tie_weights()
    return BaseForCausalLM(causal_lm, mtp=False)
