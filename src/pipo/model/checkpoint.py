"""Loading PIPO checkpoints, strictly: our layout, the authors', LoRA adapters. `save.py` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig
from transformers.initialization import no_init_weights

from pipo.errors import CheckpointError, ConfigError
from pipo.model.adapter import ADDITIONAL_CONFIG, Adapter, Rounding, apply_adapter, is_adapter, read_adapter
from pipo.model.backbone import build_causal_lm
from pipo.model.config import GATE_SETTINGS, PAPERS_GATE, PipoConfig, family_config, layout_of, reading_config
from pipo.model.convert import as_dtype, pipo_from_base, split_hub_options
from pipo.model.files import GENERATION_CONFIG, WeightFiles, find_checkpoint, read_json
from pipo.model.fingerprint import base_fingerprint
from pipo.model.layout import is_vision, load_strictly
from pipo.model.modeling import PipoForCausalLM

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
IGNORED_OPTIONS = {
    "_from_auto",
    "_commit_hash",
    "adapter_kwargs",
    "use_safetensors",
    "low_cpu_mem_usage",
    "weights_only",
}


def load_config(folder: Path) -> PipoConfig:
    """The config of a PIPO checkpoint in our layout or the authors' (flat, or nested under `text_config`).

    Raises:
        CheckpointError: unreadable, or not a PIPO checkpoint; the message says what to do with a regular one.
        UnsupportedModelError: a family that transformers does not know.
    """
    raw = read_json(folder / "config.json")
    layout = layout_of(raw)
    if layout is None:
        raise CheckpointError(
            f"{folder} is a regular {raw.get('model_type')} checkpoint, not a PIPO one; make one of it with "
            "PipoForCausalLM.from_base or `pipo init`"
        )
    with reading_config(folder / "config.json"):
        config = pipo_config_of(raw)
    if config.text_config is None:
        raise CheckpointError(f"{folder / 'config.json'} has no text_config, the backbone's own config")
    return config


def pipo_config_of(raw: dict[str, Any]) -> PipoConfig:
    """From the fields of a PIPO checkpoint's `config.json`, in either layout."""
    return cast(PipoConfig, PipoConfig.from_dict(raw)) if layout_of(raw) == "pipo" else _reference_config(raw)


def read_gate(folder: Path) -> dict[str, Any]:
    """The settings of a PIPO checkpoint's gate (:data:`pipo.model.config.GATE_SETTINGS`), without loading it; an adapter's own.

    Raises:
        CheckpointError: unreadable, or not a PIPO checkpoint.
    """
    if is_adapter(folder):
        path = folder / ADDITIONAL_CONFIG
        said = read_json(path) if path.exists() else {}
        return PAPERS_GATE | {name: said[name] for name in GATE_SETTINGS if name in said}
    config = load_config(folder)
    return {name: getattr(config, name) for name in GATE_SETTINGS}


def _reference_config(raw: dict[str, Any]) -> PipoConfig:
    """The authors' `config.json`: the backbone's fields flat, or nested under `text_config`."""
    text = raw.get("text_config", raw)
    compressor_type = raw.get("compressor_type", text.get("compressor_type", "linear"))
    model_type = text.get("model_type") or raw["model_type"]
    model_type = model_type if model_type.endswith("_text") else f"{model_type}_text"
    kept = {
        k: v
        for k, v in text.items()
        if k not in ("architectures", "model_type", "mtp_num_hidden_layers", "compressor_type", *GATE_SETTINGS)
    }
    if "tie_word_embeddings" in raw:
        kept["tie_word_embeddings"] = raw["tie_word_embeddings"]
    if text.get("mtp_num_hidden_layers", 1) != 1:
        raise CheckpointError(f"a PIPO model has one MTP layer, this one {text['mtp_num_hidden_layers']}")
    config = family_config({"model_type": model_type, **kept})
    if config.dtype is None and raw.get("dtype"):
        config.dtype = raw["dtype"]
    gate = {name: raw.get(name, text.get(name)) for name in GATE_SETTINGS if name in raw or name in text}
    return PipoConfig(config, compressor_type=compressor_type, **gate)


def load_pipo(
    path_or_id: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    torch_dtype: str | torch.dtype | None = None,
    subfolder: str | None = None,
    attn_implementation: str | None = None,
    base: str | Path | None = None,
    config: PipoConfig | None = None,
    **kwargs: Any,
) -> PipoForCausalLM:
    """Load a PIPO checkpoint, a folder or a hub id, into a model in eval mode.

    Args:
        dtype: of the weights, by default the checkpoint's (`torch_dtype` is its older name).
        subfolder: of the folder or repository. base: for an adapter folder, the base model to put it on, by default the one it names.
        config: as `AutoModelForCausalLM` passes it; the checkpoint's own is read where absent.

    Raises:
        CheckpointError: names every missing, unexpected or misshapen tensor, and every unreadable file.
    """
    options = split_hub_options(kwargs)
    if kwargs.pop("trust_remote_code", False):
        raise ConfigError("trust_remote_code: PIPO checkpoints hold no code, and none is ever run")
    unknown = sorted(key for key in kwargs if key not in IGNORED_OPTIONS and kwargs[key] is not None)
    if unknown:
        raise ConfigError(f"from_pretrained does not know {', '.join(unknown)}")
    wanted = as_dtype(dtype if dtype is not None else torch_dtype)
    folder = find_checkpoint(path_or_id, subfolder, **options)
    if is_adapter(folder):
        options.pop("revision", None)  # the adapter's own, not its base model's
        return merge_adapter(folder, base, dtype=wanted, attention=attn_implementation, **options)[0]
    if base is not None:
        raise ConfigError(f"{folder} is a whole checkpoint, not an adapter: base={base} has no meaning for it")
    return _load_whole(folder, config or load_config(folder), wanted, attn_implementation)


def merge_adapter(
    folder: Path,
    base: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    **hub: Any,
) -> tuple[PipoForCausalLM, Rounding]:
    """The model of an adapter folder merged into its base, and what the base's dtype rounds off.

    The base may be a regular checkpoint, a PIPO one, or another adapter. `base` and `dtype` as in :func:`load_pipo`.

    Raises:
        CheckpointError: the base can't be had, is another one than the adapter was trained on, or does not fit it.
    """
    adapter = read_adapter(folder, base)
    home = _find_base(adapter, **hub)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    if is_pipo(home):
        model = load_pipo(home, **options)
        if model.config.compressor_type != adapter.compressor_type:
            raise CheckpointError(
                f"{folder} has a compressor of type {adapter.compressor_type}, its base {home} one of type "
                f"{model.config.compressor_type}; name the base that it was trained on (base=, --base)"
            )
        _set_gate(model, adapter)
        return model, apply_adapter(model, adapter, whole_needed=False)
    model = pipo_from_base(home, adapter.compressor_type, **options)
    _set_gate(model, adapter)
    return model, apply_adapter(model, adapter)


def _set_gate(model: PipoForCausalLM, adapter: Adapter) -> None:
    """Make the gate of the kind whose weights an adapter holds."""
    with reading_config(adapter.folder / ADDITIONAL_CONFIG):
        model.set_gate(**adapter.gate)


def _find_base(adapter: Adapter, **hub: Any) -> Path:
    try:
        home = find_checkpoint(adapter.base, **hub)
    except CheckpointError as error:
        raise CheckpointError(
            f"the base of adapter {adapter.folder} can't be had: {error}. If it has moved, name its place (base=, --base)"
        ) from error
    if home.resolve() == adapter.folder.resolve():
        raise CheckpointError(f"adapter {adapter.folder} names itself as its base; name the model it was trained on")
    if adapter.base_fingerprint is not None and (found := base_fingerprint(home)) != adapter.base_fingerprint:
        raise CheckpointError(
            f"{home} is not the base that adapter {adapter.folder} was trained on: its weights have fingerprint {found[:16]}…, "
            f"the adapter's base had {adapter.base_fingerprint[:16]}…; name the right one (base=, --base)"
        )
    return home


def _load_whole(folder: Path, config: PipoConfig, dtype: torch.dtype | None, attention: str | None) -> PipoForCausalLM:
    files = WeightFiles(folder)
    dtype = dtype or config.dtype or config.text_config.dtype or _stored_dtype(files)
    with no_init_weights():
        causal_lm = build_causal_lm(config.text_config, as_dtype(dtype), attention)
        model = PipoForCausalLM(config, causal_lm=causal_lm, initialise=False)
    _fill(model, folder, files)
    defaults = folder / GENERATION_CONFIG
    if defaults.is_file():
        with reading_config(defaults):
            model.generation_config = GenerationConfig.from_dict(read_json(defaults))
    model.eval()
    return model


def _fill(model: PipoForCausalLM, folder: Path, files: WeightFiles) -> None:
    tied = bool(model.config.tie_word_embeddings)
    has_vision = "vision_config" in read_json(folder / "config.json")
    keys = [key for key in files if not (has_vision and is_vision(key))]
    load_strictly(model, files, keys, optional=frozenset({HEAD} if tied else ()))
    if tied:
        _check_tied_head(folder, files)
        model.tie_weights()


def check_weights(folder: Path, config: PipoConfig, files: WeightFiles) -> None:
    """Check a whole checkpoint's tensors as loading would, but hold no more than one of them in memory.

    Raises:
        CheckpointError: what :func:`load_pipo` would raise.
    """
    with no_init_weights(), torch.device("meta"):
        causal_lm = build_causal_lm(config.text_config, None)
        model = PipoForCausalLM(config, causal_lm=causal_lm, initialise=False)
    _fill(model, folder, files)


def _stored_dtype(files: WeightFiles) -> torch.dtype:
    first = next(iter(files))
    return next(iter(files.read([first])))[1].dtype


def _check_tied_head(folder: Path, files: WeightFiles) -> None:
    embedding = next((k for k in files if k.endswith("embed_tokens.weight")), None)
    if HEAD not in files or embedding is None:
        return
    tensors = dict(files.read([HEAD, embedding]))
    if not torch.equal(tensors[HEAD], tensors[embedding]):
        raise CheckpointError(f"{folder} says its head is tied to the embedding, but stores another {HEAD}")


def is_pipo(folder: Path) -> bool:
    """Whether a folder holds a PIPO checkpoint, in our layout, the authors' or as an adapter; else a regular one.

    Raises:
        CheckpointError: it has no readable config.
    """
    if is_adapter(folder):
        return True
    return layout_of(read_json(folder / "config.json")) is not None
