"""From a regular checkpoint to a model: the base model itself, and a PIPO model that starts from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

from pipo.errors import CheckpointError, ConfigError
from pipo.model.backbone import refuse_unsupported, text_config_of
from pipo.model.config import PipoConfig, layout_of, reading_config, refuse_unknown
from pipo.model.files import HUB_OPTIONS, WeightFiles, find_checkpoint, key_error, read_json
from pipo.model.layout import is_vision, load_strictly, module_name, refuse_stored_twice
from pipo.model.modeling import PipoForCausalLM
from pipo.model.mtp import MtpBlock

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype from its name; `None` and `"auto"` mean the checkpoint's own."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return None
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bar and its table of `mtp.*` tensors, which it leaves out and we read ourselves."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def split_hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the options of a hub download out of `kwargs`."""
    return {key: kwargs.pop(key) for key in list(kwargs) if key in HUB_OPTIONS}


def load_base(
    folder: Path, dtype: torch.dtype | None = None, attention: str | None = None
) -> tuple[Any, PreTrainedConfig, WeightFiles]:
    """A regular checkpoint as transformers loads it, strictly; its text config; its files.

    `mtp.*` and the vision tensors of a multimodal checkpoint are left to the caller.

    Raises:
        CheckpointError: unreadable, missing or unexpected tensors, or a PIPO checkpoint.
        UnsupportedModelError: a family that PIPO can't run.
    """
    config = base_config(folder)
    files = WeightFiles(folder)
    refuse_unsupported(config)
    refuse_stored_twice(files, list(files))
    kwargs: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    try:
        with _quiet_transformers():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype or "auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                use_safetensors=True,
                trust_remote_code=False,
                **kwargs,
            )
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error)
        if "above report" in reason:  # which is in the log, and silenced
            reason = "tensors that are joined into one, as experts are, do not fit each other"
        raise CheckpointError(f"{folder} can't be loaded as a {config.model_type} model: {reason}") from error
    unexpected = [k for k in info["unexpected_keys"] if not k.startswith("mtp.") and not is_vision(k)]
    missing = [*info["missing_keys"]]
    misshapen = [f"{key} {tuple(is_)} should be {tuple(should)}" for key, is_, should in info["mismatched_keys"]]
    if missing or unexpected or misshapen:
        raise key_error(folder, missing=missing, unexpected=unexpected, misshapen=misshapen)
    return model, config, files


def base_config(folder: Path) -> PreTrainedConfig:
    """The text config of a regular checkpoint.

    Raises:
        CheckpointError: unreadable, or a PIPO checkpoint. UnsupportedModelError: a family unknown to transformers.
    """
    raw = read_json(folder / "config.json")
    if layout_of(raw) is not None:
        raise CheckpointError(f"{folder} is a PIPO checkpoint already; a base model is a regular one")
    refuse_unknown(raw.get("model_type"))
    with reading_config(folder / "config.json"):
        config = text_config_of(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    if "tie_word_embeddings" in raw:  # a multimodal config says it once for the whole model
        config.tie_word_embeddings = raw["tie_word_embeddings"]
    return config


def load_mtp(mtp: MtpBlock, files: WeightFiles) -> bool:
    """Fill an MTP block from a base checkpoint's `mtp.*` tensors, strictly; False where it has none."""
    keys = [key for key in files if module_name(key).startswith("mtp.")]
    if keys:
        load_strictly(mtp, files, keys, prefix="mtp.")
    return bool(keys)


def pipo_from_base(
    path_or_id: str | Path,
    compressor: str = "mlp",
    *,
    dtype: str | torch.dtype | None = None,
    subfolder: str | None = None,
    pad_token_id: int | None = None,
    attn_implementation: str | None = None,
    **hub: Any,
) -> PipoForCausalLM:
    """A PIPO model that starts from a regular checkpoint, a folder or a hub id.

    The backbone and head are taken over; the MTP block takes the checkpoint's `mtp.*` tensors where it has them,
    else starts as a copy of the last full-attention layer; the compressor starts as a sum. (Section 3.1.)

    Args:
        compressor: `mlp` or `linear`. dtype: of the weights, by default the checkpoint's. pad_token_id: which vocabulary
            id fills empty second slots, by default the base model's PAD.

    Raises:
        CheckpointError, ConfigError, UnsupportedModelError
    """
    options = split_hub_options(hub)
    if hub:
        raise ConfigError(f"from_base does not know {', '.join(sorted(hub))}")
    folder = find_checkpoint(path_or_id, subfolder, **options)
    causal_lm, config, files = load_base(folder, as_dtype(dtype), attn_implementation)
    pad = pad_token_id if pad_token_id is not None else _pad_of_tokenizer(folder, config)
    model = PipoForCausalLM(PipoConfig(config, compressor_type=compressor, pad_token_id=pad), causal_lm=causal_lm)
    model.backbone.check_output_map(causal_lm)
    model.generation_config = causal_lm.generation_config
    load_mtp(model.mtp, files)
    model.eval()
    return model


def _pad_of_tokenizer(folder: Path, config: PreTrainedConfig) -> int | None:
    """The PAD id that a checkpoint's tokenizer names, where its config names none."""
    path = folder / "tokenizer_config.json"
    if config.pad_token_id is not None or not path.is_file():
        return None
    pad = read_json(path).get("pad_token")
    text = pad.get("content") if isinstance(pad, dict) else pad
    if text is None or not (folder / "tokenizer.json").is_file():
        return None
    added = read_json(folder / "tokenizer.json").get("added_tokens") or []
    return next((int(token["id"]) for token in added if token.get("content") == text), None)
