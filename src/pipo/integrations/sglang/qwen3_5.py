"""Qwen3.5 backbones as SGLang knows them: the same configs, but with layers told one by one, the MTP block's among them."""

from __future__ import annotations

from typing import Any

from sglang.srt.arg_groups import model_override_base
from sglang.srt.configs.linear_attn_model_registry import LinearAttnModelSpec, register_linear_attn_model
from sglang.srt.configs.qwen3_5 import Qwen3_5MoeTextConfig, Qwen3_5TextConfig

KINDS = {"full_attention": "attention", "linear_attention": "linear_attention"}


class _LayerByLayer:
    pipo_layers: list[str]
    num_hidden_layers: int

    @property
    def layers_block_type(self) -> list[str]:
        """SGLang's name for each layer's kind; what is not the backbone's is the MTP block's, and attention."""
        kinds = [KINDS[kind] for kind in self.pipo_layers]
        return [*kinds, "attention"][: self.num_hidden_layers]


# Both spell their constructor out: transformers makes a dataclass of every config class, which would bypass their parents' own.


class PipoTextConfig(_LayerByLayer, Qwen3_5TextConfig):
    """A dense backbone's. `layers`: the kind of each."""

    def __init__(self, layers: list[str] | None = None, **fields: Any) -> None:
        super().__init__(**fields)
        self.pipo_layers = layers or []
        self.full_attention_interval = fields.get("full_attention_interval", 4)


class PipoMoeTextConfig(_LayerByLayer, Qwen3_5MoeTextConfig):
    """A backbone's with experts. `layers`: the kind of each."""

    def __init__(self, layers: list[str] | None = None, **fields: Any) -> None:
        super().__init__(**fields)
        self.pipo_layers = layers or []
        self.full_attention_interval = fields.get("full_attention_interval", 4)


KNOWN_AS = {
    PipoTextConfig: "Qwen3_5ForConditionalGeneration",
    PipoMoeTextConfig: "Qwen3_5MoeForConditionalGeneration",
}
"""The names under which SGLang knows which kernels to choose for these backbones."""


def register(architecture: str) -> None:
    """Tell SGLang which layers hold states instead of keys and values, what runs them, and which kernels to choose."""
    for config_class in KNOWN_AS:
        register_linear_attn_model(
            LinearAttnModelSpec(
                config_class=config_class,
                backend_class_name="sglang.srt.layers.attention.linear.gdn_backend.GDNAttnBackend",
                arch_names=[],
                support_mamba_cache_extra_buffer=True,
            )
        )
    model_override_base.register_model_override(architecture)(kernels_of_the_family)


def kernels_of_the_family(server_args: Any, config: Any) -> dict[str, Any]:
    """What SGLang sets for these backbones by their own names, where a user said nothing."""
    chosen: dict[str, Any] = {}
    for choose in model_override_base._MODEL_OVERRIDE_FNS.get(KNOWN_AS.get(type(config), ""), ()):
        chosen |= choose(server_args, config)
    return chosen
