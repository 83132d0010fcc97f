"""A model for the engine: loaded from a folder or taken over from memory, and how much memory its cache may take."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pipo.engine.core import CacheBudget
from pipo.engine.quantization import Quantization, check_quantization, quantize
from pipo.engine.runner import Runner
from pipo.errors import CheckpointError, ConfigError, KernelError
from pipo.model.adapter import is_adapter, read_adapter, tokenizer_home
from pipo.model.base import BaseForCausalLM
from pipo.model.checkpoint import is_pipo, load_config, load_pipo, read_gate
from pipo.model.config import DEFAULT_THRESHOLD, GATE_SETTINGS
from pipo.model.convert import as_dtype, base_config
from pipo.model.draft_vocab import DRAFT_VOCAB, DraftIds, first_ids, read_draft_ids
from pipo.model.files import TOKENIZER_FILES, WeightFiles, read_json
from pipo.model.files import find_checkpoint as find_checkpoint
from pipo.model.fingerprint import base_fingerprint
from pipo.model.fused import Fusion, fuse
from pipo.model.modeling import PipoForCausalLM

logger = logging.getLogger("pipo")

MEMORY_SHARE = {"cpu": 0.5, "cuda": 0.85}
"""Share of the free memory that the cache may take, unless told otherwise."""


def generation_defaults(folder: Path) -> dict[str, Any]:
    """A checkpoint's `generation_config.json`; empty where it has none."""
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def load_model(
    folder: Path,
    method: str,
    device: str | torch.device | None,
    dtype: Any,
    attention: str | None,
    quantization: Quantization | None = None,
) -> PipoForCausalLM | BaseForCausalLM:
    """The model of a checkpoint folder, on its device, for inference only.

    Raises:
        CheckpointError: `method` does not run on this kind of checkpoint. ConfigError: weights can't be quantised so here.
    """
    pipo = check_method(folder, method)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if quantization is not None:
        check_quantization(quantization, device)
    model: PipoForCausalLM | BaseForCausalLM = (
        load_pipo(folder, dtype=dtype, attn_implementation=attention)
        if pipo
        else BaseForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    )
    model.to(device)
    model.eval().requires_grad_(False)
    if quantization is not None:
        quantize(model, quantization)
    return model


def kind_of(folder: Path) -> Literal["pipo", "base"]:
    """Whether a checkpoint folder holds a PIPO model, or a base one, which the baselines run.

    Raises:
        CheckpointError: it has no readable config.
    """
    return "pipo" if is_pipo(folder) else "base"


def check_method(folder: Path, method: str) -> bool:
    """Check that a checkpoint folder can decode so, without loading it; whether it is a PIPO one.

    Raises:
        CheckpointError: `method` does not run on this kind of checkpoint. ConfigError: it needs an MTP block, which is not there.
    """
    pipo = is_pipo(folder)
    if method == "pipo" and not pipo:
        raise CheckpointError(
            f"{folder} is a regular checkpoint, which has no pairs to decode; use method='regular', 'mtp' or "
            "'speculative', or make a PIPO checkpoint of it with `pipo init`"
        )
    if method != "pipo" and pipo:
        raise CheckpointError(
            f"{folder} is a PIPO checkpoint, whose backbone expects latents of pairs: method={method!r} needs a base one"
        )
    if method in ("mtp", "speculative") and not any(key.startswith("mtp.") for key in WeightFiles(folder)):
        raise ConfigError(f"method={method!r} drafts with the model's MTP block, and {folder} has no mtp.* tensors")
    return pipo


DraftVocabulary = str | Path | int | Sequence[int] | DraftIds | None
"""What drafts are drawn from: the checkpoint's own file where it has one (`OF_CHECKPOINT`); a file, or a folder that has one; the first N
ids; these ids; or the whole vocabulary (`None`)."""
OF_CHECKPOINT = "checkpoint"


def choose_draft_ids(chosen: DraftVocabulary, folder: Path | None, vocab_size: int | None = None) -> DraftIds | None:
    """The ids that drafts are drawn from; `None`: the whole vocabulary.

    Args:
        folder: of the checkpoint; `None` for a model in memory, which brings no file.
        vocab_size: V, where it is known already.

    Raises:
        CheckpointError: a file that is not there or holds something else. ConfigError: ids that this vocabulary does not have.
    """
    if chosen is None or isinstance(chosen, DraftIds):
        return chosen
    if isinstance(chosen, int):
        return first_ids(chosen, vocab_size or max(1, chosen))
    if chosen == OF_CHECKPOINT:
        own = None if folder is None else folder / DRAFT_VOCAB
        return None if own is None or not own.is_file() else read_draft_ids(own)
    if isinstance(chosen, str | Path):
        path = Path(chosen)
        if not path.exists():
            raise CheckpointError(f"{path} is no file on this machine: `pipo draft-vocab` makes a draft vocabulary")
        return read_draft_ids(path / DRAFT_VOCAB if path.is_dir() else path)
    ids = tuple(chosen)
    return DraftIds(ids, vocab_size or max(ids, default=0) + 1)


def vocabulary_of(folder: Path) -> tuple[int, set[int]]:
    """V of a checkpoint folder's model, and the ids that end its texts, without loading it.

    Raises:
        CheckpointError: it has no readable config, or is an adapter whose base can't be had.
    """
    ends = [generation_defaults(tokenizer_home(folder)).get("eos_token_id")]
    while is_adapter(folder):
        folder = find_checkpoint(read_adapter(folder).base)
    config = load_config(folder).text_config if is_pipo(folder) else base_config(folder)
    assert config is not None
    ends.append(config.eos_token_id)
    return int(config.vocab_size), set().union(*map(ids_of, ends))


def ids_of(value: Any) -> set[int]:
    """Token ids that a config gives as one, as several or not at all."""
    if value is None:
        return set()
    return {int(v) for v in (value if isinstance(value, (list, tuple, set)) else [value])}


def threshold_of(folder: Path) -> float:
    """τ of requests that name none, as a checkpoint folder says.

    Raises:
        CheckpointError: it can't be read.
    """
    return float(read_gate(folder)["threshold"]) if is_pipo(folder) else DEFAULT_THRESHOLD


def describe_checkpoint(
    folder: Path,
    device: str | None,
    dtype: str | None,
    draft_ids: DraftIds | None = None,
    quantization: Quantization | None = None,
) -> dict[str, Any]:
    """What decides the texts of a checkpoint beside how it is sampled, without loading it; plain JSON values.

    `weights` and `texts` are SHA-256: of the tensors (see `base_fingerprint`), and of what makes ids of texts and ends them. `gate` is
    without τ of requests that name none: how something is sampled names it. `draft_ids`: what drafts are drawn from.
    `quantization`: of the weights.
    """
    config = {} if is_adapter(folder) else read_json(folder / "config.json")
    stored = [part.get(name) for part in (config, config.get("text_config") or {}) for name in ("dtype", "torch_dtype")]
    home = tokenizer_home(folder)
    digest = hashlib.sha256()
    for path in sorted(home / name for name in TOKENIZER_FILES):
        if path.is_file():
            digest.update(f"{path.name}\n".encode() + path.read_bytes())
    gate = (
        {name: value for name, value in read_gate(folder).items() if name != "threshold"} if is_pipo(folder) else None
    )
    return {
        "kind": kind_of(folder),
        "weights": base_fingerprint(folder),
        "texts": digest.hexdigest(),
        "dtype": dtype or next((value for value in stored if value), "as stored"),
        "device": torch.device(device).type if device else "cuda" if torch.cuda.is_available() else "cpu",
        **({} if gate is None else {"gate": gate}),
        **({} if draft_ids is None else {"draft_vocab": draft_ids.digest}),
        **({} if quantization is None else {"quantization": str(quantization)}),
    }


def accept_model(
    model: nn.Module,
    method: str,
    device: str | torch.device | None,
    dtype: Any,
    quantization: Quantization | None = None,
) -> PipoForCausalLM | BaseForCausalLM:
    """A model in memory as it is, its weights shared.

    Raises:
        ConfigError: not one of ours, or not of the method, device or dtype asked for; or it should be quantised.
    """
    if quantization is not None:
        raise ConfigError(
            f"quantization={quantization!r} is for a checkpoint that is loaded: the weights of a model in memory are its owner's"
        )
    if not isinstance(model, (PipoForCausalLM, BaseForCausalLM)):
        raise ConfigError(f"a model in memory must be a PipoForCausalLM or BaseForCausalLM, got {type(model).__name__}")
    if (method == "pipo") != isinstance(model, PipoForCausalLM):
        raise ConfigError(f"method={method!r} does not run on a {type(model).__name__}")
    if device is not None and torch.device(device).type != model.device.type:
        raise ConfigError(f"the model is on {model.device}, not {device}; move it first (its weights are not copied)")
    if dtype is not None and as_dtype(dtype) not in (None, model.dtype):
        raise ConfigError(f"the model is {model.dtype}, not {dtype}; cast it first (its weights are not copied)")
    return model


def use_kernels(model: PipoForCausalLM | BaseForCausalLM, choice: str | None, shared: bool) -> Fusion | None:
    """Let a model on a CPU decode by kernels of our own; what runs through them, or None.

    Args:
        choice: `native`; `torch` (none of our own); `auto`: native for bfloat16, where there is a compiler; None: `auto`, but `torch` for
            a model in memory, which others may be training. shared: whether it is one.

    Raises:
        ConfigError: another choice, or `native` for a model elsewhere. KernelError: `native`, and they can't be compiled here.
    """
    if choice not in (None, "auto", "native", "torch"):
        raise ConfigError(f"kernels must be auto, native or torch, got {choice!r}")
    if choice == "native":
        if model.device.type != "cpu":
            raise ConfigError(
                f"kernels='native' are for a CPU, and the model is on {model.device}; choose kernels='auto'"
            )
        return fuse(model, move_weights=not shared)
    if choice == "torch" and model.backbone.fusion is not None:
        model.backbone.fusion.undo()
    if choice == "torch" or (choice is None and shared) or model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return None
    try:
        return fuse(model, move_weights=not shared)
    except KernelError as error:
        logger.warning("decoding will be slower than it could be: %s", error)
        return None


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Write the weights of a model, and the settings of its gate, into another of the same shape, in place.

    Raises:
        CheckpointError: names or shapes differ; nothing has been written then.
    """
    fresh, held = source.state_dict(), target.state_dict()
    other = sorted(fresh.keys() ^ held.keys())
    other += [name for name in fresh.keys() & held.keys() if fresh[name].shape != held[name].shape]
    if other:
        raise CheckpointError(
            f"these weights are of another model: {len(other)} tensors differ in name or shape, such as {', '.join(other[:3])}"
        )
    for name, tensor in held.items():
        tensor.copy_(fresh[name])
    if isinstance(source, PipoForCausalLM) and isinstance(target, PipoForCausalLM):
        target.set_gate(**{name: getattr(source.config, name) for name in GATE_SETTINGS})


def cache_budget(runner: Runner, device: torch.device, total_bytes: int | None) -> CacheBudget:
    """Measure what rows and positions cost on this model, by prefilling two tiny prompts."""
    row_bytes, position_bytes = runner.measure_bytes()
    total = total_bytes if total_bytes is not None else int(MEMORY_SHARE.get(device.type, 0.5) * _free(device))
    return CacheBudget(total, row_bytes, position_bytes)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        # What torch holds and does not use counts as free: an engine that was closed before leaves it behind.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
