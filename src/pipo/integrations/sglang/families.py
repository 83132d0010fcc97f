"""What differs between the families that are served: SGLang's classes for config, layers and norms, how weights get into them, and what
SGLang's layers would compute otherwise than the family's own, which is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pipo.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Weights = Iterable[tuple[str, Tensor]]
Differences = dict[str, Callable[[Any], Any]]
"""What to call it → whether a config has it."""


@dataclass(frozen=True)
class Family:
    """A family of decoders. Modules are built lazily: SGLang is imported where a server builds a model."""

    model_type: str
    architecture: str
    """Under which SGLang serves regular models of it."""
    config: Callable[[PreTrainedConfig], Any]
    """SGLang's config of a backbone."""
    body: Callable[[Any, str], nn.Module]
    """`(config, prefix)` to embedding, layers and final norm."""
    one_layer: Callable[[Any], Any]
    """From the served config to that of a body with one full-attention layer."""
    norm: Callable[[int, float], nn.Module]
    load: Callable[[nn.Module, Weights], set[str]]
    """Fills a body from names without prefix, tells which of its parameters it filled."""
    differences: Differences
    """What SGLang's layers do otherwise than the family's own."""

    def refuse(self, config: PreTrainedConfig) -> None:
        """Raise `UnsupportedModelError` where SGLang's layers would not compute what the checkpoint's do."""
        if found := [name for name, has in self.differences.items() if has(config)]:
            raise UnsupportedModelError(
                f"a {self.model_type} backbone with {', '.join(found)} is not served on SGLang; `pipo serve` serves it"
            )


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a backbone.

    Raises:
        UnsupportedModelError: it is not served on SGLang; the message names those that are.
    """
    for family in FAMILIES:
        if config.model_type == family.model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise UnsupportedModelError(
        f"{config.model_type} is not served on SGLang; these are: {known}. `pipo serve` serves any decoder"
    )


# --- what SGLang's layers do otherwise ------------------------------------------------------------------

SCALED_ALIKE = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embeddings that SGLang computes as transformers does."""


def _rope(config: Any) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


_ANY: Differences = {
    "a sliding window": lambda c: "sliding_attention" in (getattr(c, "layer_types", None) or ()),
    "rotary embeddings of a kind other than " + ", ".join(SCALED_ALIKE): (
        lambda c: _rope(c).get("rope_type", "default") not in SCALED_ALIKE
    ),
    "an activation other than SiLU": lambda c: c.hidden_act not in ("silu", "swish"),
}
_WHOLE_HEADS: Differences = {
    "partly rotated heads": lambda c: _rope(c).get("partial_rotary_factor", 1.0) != 1.0,
}
_NO_BIAS: Differences = {"attention biases": lambda c: getattr(c, "attention_bias", False)}
_NO_MLP_BIAS: Differences = {"MLP biases": lambda c: getattr(c, "mlp_bias", False)}


# --- Qwen3.5 --------------------------------------------------------------------------------------------


def _qwen3_5_config(config: PreTrainedConfig) -> Any:
    from pipo.integrations.sglang import qwen3_5

    fields = config.to_dict()
    fields.pop("model_type", None)
    fields["partial_rotary_factor"] = _rope(config).get("partial_rotary_factor", 0.25)
    config_class = qwen3_5.PipoMoeTextConfig if "moe" in config.model_type else qwen3_5.PipoTextConfig
    return config_class(layers=list(config.layer_types), **fields)


def _qwen3_5_body(config: Any, prefix: str) -> nn.Module:
    from sglang.srt.models.qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM

    body = Qwen3_5MoeForCausalLM if "moe" in config.model_type else Qwen3_5ForCausalLM
    return body(config, None, prefix)  # type: ignore[no-any-return]


def _qwen3_5_one_layer(config: Any) -> Any:
    alone = _one_layer(config)
    alone.pipo_layers = ["full_attention"]
    return alone


def _qwen3_5_norm(size: int, eps: float) -> nn.Module:
    from sglang.srt.layers.layernorm import GemmaRMSNorm

    return GemmaRMSNorm(size, eps)  # type: ignore[no-any-return]


def _load_qwen3_5(body: nn.Module, weights: Weights) -> set[str]:
    return set(body.load_weights(weights))  # type: ignore[operator]


# --- Qwen3, Llama ---------------------------------------------------------------------------------------


def _norm(size: int, eps: float) -> nn.Module:
    from sglang.srt.layers.layernorm import RMSNorm

    return RMSNorm(size, eps)  # type: ignore[no-any-return]


def _qwen3_body(config: Any, prefix: str) -> nn.Module:
    from sglang.srt.models.qwen3 import Qwen3Model

    return Qwen3Model(config, None, prefix)  # type: ignore[no-any-return]


def _llama_body(config: Any, prefix: str) -> nn.Module:
    from sglang.srt.models.llama import LlamaModel

    return LlamaModel(config, None, prefix)  # type: ignore[no-any-return]


def _one_layer(config: Any) -> Any:
    alone = deepcopy(config)
    alone.num_hidden_layers = 1
    alone.vocab_size = 64  # the body's embedding is given up for the backbone's: a small one
    return alone


MERGED: dict[str, tuple[str, str | int]] = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
"""Matrices that SGLang keeps in one, and where in it."""


def _load_dense(body: nn.Module, weights: Weights) -> set[str]:
    from sglang.srt.model_loader.weight_utils import default_weight_loader

    parameters: dict[str, Any] = dict(body.named_parameters())
    filled: set[str] = set()
    for name, tensor in weights:
        part = next((part for part in MERGED if f".{part}." in name), None)
        if part is not None:
            whole, place = MERGED[part]
            name = name.replace(part, whole)
            parameters[name].weight_loader(parameters[name], tensor, place)
        else:
            getattr(parameters[name], "weight_loader", default_weight_loader)(parameters[name], tensor)
        filled.add(name)
    return filled


# --- the table ------------------------------------------------------------------------------------------

QWEN3_5 = Family(
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    config=_qwen3_5_config,
    body=_qwen3_5_body,
    one_layer=_qwen3_5_one_layer,
    norm=_qwen3_5_norm,
    load=_load_qwen3_5,
    differences=_ANY | _NO_BIAS,
)
QWEN3_5_MOE = replace(QWEN3_5, model_type="qwen3_5_moe_text", architecture="Qwen3_5MoeForCausalLM")
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    config=deepcopy,
    body=_qwen3_body,
    one_layer=_one_layer,
    norm=_norm,
    load=_load_dense,
    differences=_ANY | _WHOLE_HEADS,
)
LLAMA = replace(
    QWEN3,
    model_type="llama",
    architecture="LlamaForCausalLM",
    body=_llama_body,
    differences=_ANY | _WHOLE_HEADS | _NO_MLP_BIAS,
)
FAMILIES = (QWEN3_5, QWEN3_5_MOE, QWEN3, LLAMA)


def register(architecture: str) -> None:
    """Give our architecture what SGLang gives those of the families by their names."""
    from pipo.integrations.sglang import qwen3_5

    qwen3_5.register(architecture)
