"""`PipoConfig`: a Hugging Face decoder's config, and what PIPO adds to it."""

from __future__ import annotations

from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig

from pipo.errors import ConfigError

CompressorType = Literal["mlp", "linear"]
COMPRESSOR_TYPES: tuple[CompressorType, ...] = ("mlp", "linear")


class PipoConfig(PreTrainedConfig):
    """Config of a PIPO model (`model_type: pipo`).

    Args:
        text_config: the backbone's own config, as an object or a dict with its `model_type`. A multimodal config is
            reduced to its text part.
        compressor_type: `mlp` (2H→2H→H with SiLU, the paper's default) or `linear` (2H→H). Section 3.1.
        pad_token_id: the vocabulary id that fills empty second slots; by default the backbone's.

    Raises:
        ConfigError: no usable PAD id, or an unknown compressor type.
    """

    model_type = "pipo"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 (transformers reads a plain class attribute)

    def __init__(
        self,
        text_config: Any = None,
        compressor_type: str = "mlp",
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = dict(text_config)
            if "model_type" not in text_config:
                raise ConfigError("text_config has no model_type, so its family is unknown")
            text_config = AutoConfig.for_model(text_config.pop("model_type"), **text_config)
        if text_config is not None:
            text_config = text_config.get_text_config(decoder=True)
        if compressor_type not in COMPRESSOR_TYPES:
            raise ConfigError(f"compressor_type must be one of {', '.join(COMPRESSOR_TYPES)}, got {compressor_type!r}")
        self.text_config: Any = text_config
        self.compressor_type = compressor_type
        if text_config is not None:
            pad_token_id = _pad_id(pad_token_id, text_config)
            kwargs.setdefault("attn_implementation", text_config._attn_implementation)
            kwargs.setdefault("eos_token_id", text_config.eos_token_id)
            kwargs.setdefault("bos_token_id", text_config.bos_token_id)
            kwargs["tie_word_embeddings"] = bool(text_config.tie_word_embeddings)
        super().__init__(pad_token_id=pad_token_id, **kwargs)

    @property
    def hidden_size(self) -> int:
        """Width `H` of the backbone."""
        return int(self.text_config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Entries `V` of the vocabulary."""
        return int(self.text_config.vocab_size)

    @property
    def max_position_embeddings(self) -> int:
        """Positions of the backbone: the most **pairs** a sequence can hold."""
        return int(self.text_config.max_position_embeddings)


def _pad_id(pad_token_id: int | None, text_config: PreTrainedConfig) -> int:
    """The id that fills empty second slots: the one given, else the backbone's PAD, else its first end-of-text id."""
    eos = text_config.eos_token_id
    for candidate in (pad_token_id, text_config.pad_token_id, eos[0] if isinstance(eos, list) else eos):
        if candidate is None:
            continue
        if not 0 <= candidate < text_config.vocab_size:
            raise ConfigError(f"pad_token_id {candidate} is not in the vocabulary of {text_config.vocab_size} entries")
        return int(candidate)
    raise ConfigError(
        f"{text_config.model_type} names neither a PAD nor an end-of-text id; pass pad_token_id, the vocabulary id "
        "that shall fill empty second slots"
    )
