"""Configs of Qwen3.5 backbones as SGLang knows them: the same, but with layers told one by one, the MTP block's among them."""

from __future__ import annotations

from sglang.srt.configs.linear_attn_model_registry import LinearAttnModelSpec, register_linear_attn_model
from sglang.srt.configs.qwen3_5 import Qwen3_5MoeTextConfig, Qwen3_5TextConfig

KINDS = {"full_attention": "attention", "linear_attention": "linear_attention"}


class _LayerByLayer:
    pipo_layer_types: list[str]
    num_hidden_layers: int

    @property
    def layers_block_type(self) -> list[str]:
        """SGLang's name for each layer's kind; what is not the backbone's is the MTP block's, and attention."""
        kinds = [KINDS[kind] for kind in self.pipo_layer_types]
        return [*kinds, "attention"][: self.num_hidden_layers]


class PipoTextConfig(_LayerByLayer, Qwen3_5TextConfig):
    """A dense backbone's."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.full_attention_interval = kwargs.get("full_attention_interval", 4)


class PipoMoeTextConfig(_LayerByLayer, Qwen3_5MoeTextConfig):
    """A backbone's with experts."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.full_attention_interval = kwargs.get("full_attention_interval", 4)


def register() -> None:
    """Tell SGLang which layers hold states instead of keys and values, and what runs them."""
    for config_class in (PipoTextConfig, PipoMoeTextConfig):
        register_linear_attn_model(
            LinearAttnModelSpec(
                config_class=config_class,
                backend_class_name="sglang.srt.layers.attention.linear.gdn_backend.GDNAttnBackend",
                arch_names=[],
                support_mamba_cache_extra_buffer=True,
            )
        )
