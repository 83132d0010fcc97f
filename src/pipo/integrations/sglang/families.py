"""What differs between the families that are served: SGLang's classes for config, layers and norms, and how weights get into them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pipo.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Weights = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class Family:
    """A family of decoders. Modules are built lazily: SGLang is imported where a server builds a model."""

    model_types: tuple[str, ...]
    config: Callable[[PreTrainedConfig], Any]
    """SGLang's config of a backbone."""
    body: Callable[..., nn.Module]
    """`(config, quant_config, prefix)` to embedding, layers and final norm."""
    one_layer: Callable[[Any], Any]
    """From the served config to that of a body with one full-attention layer."""
    norm: Callable[[int, float], nn.Module]
    load: Callable[[nn.Module, Weights], set[str]]
    """Fills a body from names without prefix, tells which parameters it filled."""


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a backbone.

    Raises:
        UnsupportedModelError: it is not served on SGLang; the message names those that are.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise UnsupportedModelError(
        f"{config.model_type} is not served on SGLang; these are: {known}. `pipo serve` serves any decoder"
    )


# --- the families ---------------------------------------------------------------------------------------


def _qwen3_5_config(config: PreTrainedConfig) -> Any:
    fields = config.to_dict()
    fields.pop("model_type", None)
    found = _qwen3_5_class("moe" in config.model_type)(**fields)
    found.pipo_layer_types = list(config.layer_types)
    return found


def _qwen3_5_class(moe: bool) -> type:
    from pipo.integrations.sglang import qwen3_5

    return qwen3_5.PipoMoeTextConfig if moe else qwen3_5.PipoTextConfig


def _qwen3_5_body(config: Any, quant_config: Any, prefix: str, **options: Any) -> nn.Module:
    from sglang.srt.models.qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM

    body = Qwen3_5MoeForCausalLM if "moe" in config.model_type else Qwen3_5ForCausalLM
    return body(config, quant_config, prefix, **options)  # type: ignore[no-any-return]


def _qwen3_5_one_layer(config: Any) -> Any:
    alone = deepcopy(config)
    alone.num_hidden_layers, alone.pipo_layer_types = 1, ["full_attention"]
    return alone


def _gemma_norm(size: int, eps: float) -> nn.Module:
    from sglang.srt.layers.layernorm import GemmaRMSNorm

    return GemmaRMSNorm(size, eps)  # type: ignore[no-any-return]


def _norm(size: int, eps: float) -> nn.Module:
    from sglang.srt.layers.layernorm import RMSNorm

    return RMSNorm(size, eps)  # type: ignore[no-any-return]


def _qwen3_body(config: Any, quant_config: Any, prefix: str) -> nn.Module:
    from sglang.srt.models.qwen3 import Qwen3Model

    return Qwen3Model(config, quant_config, prefix)  # type: ignore[no-any-return]


def _llama_body(config: Any, quant_config: Any, prefix: str) -> nn.Module:
    from sglang.srt.models.llama import LlamaModel

    return LlamaModel(config, quant_config, prefix)  # type: ignore[no-any-return]


def _dense_one_layer(config: Any) -> Any:
    alone = deepcopy(config)
    alone.num_hidden_layers = 1
    return alone


def _load_dense(body: nn.Module, weights: Weights) -> set[str]:
    """SGLang keeps q, k, v in one matrix, and gate and up in another."""
    from sglang.srt.model_loader.weight_utils import default_weight_loader

    shards = {
        "q_proj": ("qkv_proj", "q"),
        "k_proj": ("qkv_proj", "k"),
        "v_proj": ("qkv_proj", "v"),
        "gate_proj": ("gate_up_proj", 0),
        "up_proj": ("gate_up_proj", 1),
    }
    parameters = dict(body.named_parameters())
    filled: set[str] = set()
    for name, tensor in weights:
        part = next((part for part in shards if f".{part}." in name), None)
        if part is not None:
            whole, shard = shards[part]
            name = name.replace(part, whole)
            parameters[name].weight_loader(parameters[name], tensor, shard)  # type: ignore[attr-defined]
        else:
            getattr(parameters[name], "weight_loader", default_weight_loader)(parameters[name], tensor)
        filled.add(name)
    return filled


def _load_qwen3_5(body: nn.Module, weights: Weights) -> set[str]:
    return set(body.load_weights(weights))  # type: ignore[operator]


QWEN3_5 = Family(
    ("qwen3_5_text", "qwen3_5_moe_text"), _qwen3_5_config, _qwen3_5_body, _qwen3_5_one_layer, _gemma_norm, _load_qwen3_5
)
QWEN3 = Family(("qwen3",), deepcopy, _qwen3_body, _dense_one_layer, _norm, _load_dense)
LLAMA = Family(("llama",), deepcopy, _llama_body, _dense_one_layer, _norm, _load_dense)
FAMILIES = (QWEN3_5, QWEN3, LLAMA)


def register() -> None:
    """Hybrids are told from other models by SGLang's own registry of configs."""
    from pipo.integrations.sglang import qwen3_5

    qwen3_5.register()
