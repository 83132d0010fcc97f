"""From a PIPO checkpoint's `config.json`, in either layout, to the config that SGLang runs: the backbone's own, with one attention layer
more, because the MTP block keeps keys and values of its own beside the backbone's.

What PIPO adds lies in attributes `pipo_*`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from pipo.errors import UnsupportedModelError
from pipo.integrations.sglang import serving
from pipo.integrations.sglang.hooks import Hook
from pipo.integrations.sglang.pair_ids import refuse_vocabulary
from pipo.model.checkpoint import pipo_config_of
from pipo.model.config import PipoConfig, layout_of

ARCHITECTURE = "PipoForCausalLM"
"""The name under which SGLang finds our model."""
REFERENCE_ARCHITECTURES = ("Qwen3_5ForCausalPIPO", "Qwen3_5MoeForCausalPIPO")
ALREADY_READ = "pipo_num_backbone_layers"


def read(config: Any) -> Any:
    """The config that SGLang runs, and this process serves; a regular model's as it is.

    Raises:
        UnsupportedModelError: a family, or a size of the vocabulary, that is not served.
    """
    raw = config.to_dict()
    if hasattr(config, ALREADY_READ) or layout_of(raw | {"architectures": config.architectures}) is None:
        return config
    found = for_sglang(config if isinstance(config, PipoConfig) else pipo_config_of(raw))
    serving.serve(found)
    return found


def for_sglang(config: PipoConfig) -> Any:
    """The backbone's config as SGLang's own class, one layer longer, with `pipo_*` attributes."""
    from pipo.integrations.sglang.families import family_of

    refuse_vocabulary(config.vocab_size)
    text = family_of(config.text_config).config(config.text_config)
    text.architectures = [ARCHITECTURE]
    text.pipo_num_backbone_layers = text.num_hidden_layers
    text.num_hidden_layers += 1
    text.pipo_compressor_type = config.compressor_type
    text.pipo_pad_id = config.pad_token_id
    text.pipo_threshold = config.threshold
    text.pipo_confidence_features = config.confidence_features
    text.pipo_confidence_scale = config.confidence_scale
    text.pipo_confidence_offset = config.confidence_offset
    text.tie_word_embeddings = bool(config.tie_word_embeddings)
    text.language_model_only = True  # positions are plain pair indices, whatever a multimodal base used
    text.dtype = text.dtype or config.dtype
    return text


def backbone(text: Any) -> Any:
    """The config of the backbone alone."""
    from copy import deepcopy

    alone = deepcopy(text)
    alone.num_hidden_layers = text.pipo_num_backbone_layers
    return alone


def register_families() -> None:
    """Tell SGLang's registries of our model and of configs that need more than a name."""
    from sglang.srt.models.registry import ModelRegistry

    import pipo  # noqa: F401 (AutoConfig knows `model_type: pipo` from here on)
    from pipo.integrations.sglang import families
    from pipo.integrations.sglang.model import PipoForCausalLM

    ModelRegistry.models[ARCHITECTURE] = PipoForCausalLM
    families.register()


def register_refusal(why: str) -> None:
    """For an SGLang that the plugin does not know: stop a server that is to serve a PIPO checkpoint, and no other."""
    from sglang.srt.models.registry import ModelRegistry

    import pipo  # noqa: F401

    class Refused:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise UnsupportedModelError(f"PIPO can't be served: {why}")

    for name in (ARCHITECTURE, *REFERENCE_ARCHITECTURES):
        ModelRegistry.models[name] = Refused


@lru_cache(maxsize=1)
def _verified() -> bool:
    from pipo.integrations.sglang import hooks

    hooks.verify()
    return True


def after_get_config(config: Any, *args: Any, **kwargs: Any) -> Any:
    """Every process of a server reads the config through here."""
    found = read(config)
    if serving.served() is not None:
        _verified()
    return found


HOOKS = (
    Hook(
        "utils.hf_transformers.config.get_config",
        "after",
        after_get_config,
        ("model", "trust_remote_code", "revision", "model_override_args", "model_config_parser", "kwargs"),
    ),
)
