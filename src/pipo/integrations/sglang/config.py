"""From a PIPO checkpoint's `config.json`, in either layout, to the config that SGLang runs: the backbone's own, with one attention layer
more, because the MTP block keeps keys and values of its own beside the backbone's.

What PIPO adds lies in attributes `pipo_*`.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import lru_cache
from typing import Any

from transformers import PreTrainedConfig

from pipo.errors import CheckpointError, ConfigError, UnsupportedModelError
from pipo.integrations.sglang import serving
from pipo.integrations.sglang.families import family_of
from pipo.integrations.sglang.hooks import Hook
from pipo.integrations.sglang.pair_ids import refuse_vocabulary
from pipo.model.checkpoint import pipo_config_of
from pipo.model.config import GATE_SETTINGS, PipoConfig, layout_of, reading_config

ARCHITECTURE = "PipoForCausalLM"
"""The name under which SGLang finds our model."""
REFERENCE_ARCHITECTURES = ("Qwen3_5ForCausalPIPO", "Qwen3_5MoeForCausalPIPO")
SETTINGS = {*GATE_SETTINGS, "text_config", "compressor_type", "pad_token_id", "dtype", "tie_word_embeddings"}
"""What `--json-model-override-args` may add to any PIPO checkpoint's config."""


def read(model: str, revision: str | None, overrides: Mapping[str, Any], **options: Any) -> tuple[PipoConfig, bool]:
    """A PIPO checkpoint's config with the server's changes, and whether its base had a vision part, whose tensors are left out.

    Raises:
        CheckpointError: the config can't be used. ConfigError: a change that it can't have.
    """
    raw, _ = PreTrainedConfig.get_config_dict(model, revision=revision, **options)
    if unknown := sorted(set(overrides) - set(raw) - SETTINGS):
        raise ConfigError(
            f"--json-model-override-args: {model} has no setting {', '.join(unknown)}; what is the backbone's lies in "
            "text_config where its config has one"
        )
    with reading_config(f"{model}/config.json"):
        config = pipo_config_of(_merged(raw, overrides))
    if config.text_config is None:
        raise CheckpointError(f"{model}/config.json has no text_config, the backbone's own config")
    if quantised := raw.get("quantization_config") or getattr(config.text_config, "quantization_config", None):
        raise UnsupportedModelError(f"{model} is quantised ({quantised}); PIPO is served from whole weights on SGLang")
    return config, "vision_config" in raw


def _merged(fields: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` with `changes` in them, at any depth."""
    merged = dict(fields)
    for name, value in changes.items():
        inner = merged.get(name)
        merged[name] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def for_sglang(config: PipoConfig) -> Any:
    """The backbone's config as SGLang's own class, one layer longer, with `pipo_*` attributes.

    Raises:
        UnsupportedModelError: a family, a kind of backbone, or a size of the vocabulary, that is not served.
    """
    refuse_vocabulary(config.vocab_size)
    family = family_of(config.text_config)
    family.refuse(config.text_config)
    text = family.config(config.text_config)
    # SGLang takes our model by the first name, and what some kernels need to know of the family from the second.
    text.architectures = [ARCHITECTURE, family.architecture]
    text.pipo_num_backbone_layers = text.num_hidden_layers
    text.num_hidden_layers += 1
    text.pipo_compressor_type = config.compressor_type
    text.pipo_pad_id = config.pad_token_id
    text.pipo_confidence_features = config.confidence_features
    text.pipo_confidence_scale = config.confidence_scale
    text.pipo_confidence_offset = config.confidence_offset
    text.tie_word_embeddings = bool(config.tie_word_embeddings)
    text.language_model_only = True  # positions are plain pair indices, whatever a multimodal base used
    text.dtype = text.dtype or config.dtype
    return text


def backbone(text: Any) -> Any:
    """The config of the backbone alone."""
    alone = deepcopy(text)
    alone.num_hidden_layers = text.pipo_num_backbone_layers
    return alone


def register_families() -> None:
    """Tell SGLang's registries of our model, and of what a family's own name would tell them."""
    from sglang.srt.models.registry import ModelRegistry

    import pipo  # noqa: F401 (AutoConfig knows `model_type: pipo` from here on)
    from pipo.integrations.sglang import families
    from pipo.integrations.sglang.model import PipoForCausalLM

    ModelRegistry.models[ARCHITECTURE] = PipoForCausalLM
    families.register(ARCHITECTURE)


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


def after_get_config(
    found: Any,
    model: str,
    trust_remote_code: bool = False,
    revision: str | None = None,
    model_override_args: Mapping[str, Any] | None = None,
    model_config_parser: str = "auto",
    **options: Any,
) -> Any:
    """Every process of a server reads the config through here.

    SGLang also looks at configs aside, without the server's changes; only what is read with them is what is served.
    """
    names = {name: getattr(found, name, None) for name in ("model_type", "architectures")}
    if layout_of(names) is None:
        if model_override_args is not None:
            serving.forget()
        return found
    config, has_vision = read(str(model), revision, model_override_args or {}, **options)
    text = for_sglang(config)
    if model_override_args is not None:
        _verified()
        serving.serve(config, has_vision)
    return text


HOOKS = (
    Hook(
        "utils.hf_transformers.config.get_config",
        "after",
        after_get_config,
        ("model", "trust_remote_code", "revision", "model_override_args", "model_config_parser", "kwargs"),
    ),
)
