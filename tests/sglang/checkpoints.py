"""Tiny random checkpoints of the families that SGLang serves, with a tokenizer of bytes, and what they must write."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from byte_tokenizer import save_tokenizer
from families import config_of, pipo_model, shake
from pipo import PipoForCausalLM, reference

VOCAB, PAD, EOS = 259, 256, 258
_BYTES: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS}

MARGIN = 1e-4
"""Gap between the two best choices below which another order of float32 sums may decide otherwise."""


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    """Random bytes, without special tokens."""
    draw = random.Random(seed)
    return [draw.randrange(256) for _ in range(num_tokens)]


# --- PIPO ------------------------------------------------------------------------------------------------------------


def save_pipo(
    folder: Path, family: str, *, compressor: str = "mlp", gate: str = "hidden", layout: str = "ours", **changes: Any
) -> PipoForCausalLM:
    """Write a random PIPO checkpoint, and return its model; at τ = 0.5 its gate commits about half of the drafts.

    `layout`: `ours`, or the authors', `flat` or `nested`. `changes`: fields of the backbone's config.
    """
    model = pipo_model(family, compressor, gate=gate, **{**_BYTES, **changes})
    if layout == "ours":
        model.save_pretrained(folder)
    else:
        model.export_reference(folder, nested=layout == "nested")
    save_tokenizer(folder)
    return model


@cache
def _written(
    model: PipoForCausalLM,
    prompt_ids: tuple[int, ...],
    max_tokens: int,
    threshold: float,
    stop_ids: tuple[int, ...] = (),
) -> reference.Generation:
    return reference.generate(model, prompt_ids, max_tokens=max_tokens, threshold=threshold, stop_ids=stop_ids)


def expected(
    model: PipoForCausalLM, prompt_ids: Sequence[int], max_tokens: int, threshold: float, *stop_ids: int
) -> list[int]:
    """What `pipo.reference` writes greedily; fails where two choices are too close to tell apart in float32."""
    written = _written(model, tuple(prompt_ids), max_tokens, threshold, stop_ids)
    assert written.margin > MARGIN, f"a choice hangs on {written.margin:.1e}; take another prompt"
    return written.token_ids


def confidences(model: PipoForCausalLM, prompt_ids: Sequence[int], max_tokens: int, threshold: float) -> list[float]:
    """What the gate thought of each draft on the way."""
    written = _written(model, tuple(prompt_ids), max_tokens, threshold)
    return [pair.confidence for pair in written.pairs if pair.confidence is not None]


# --- regular models ----------------------------------------------------------------------------------------------------


def save_regular(folder: Path, family: str) -> PreTrainedModel:
    """Write a random regular checkpoint as its authors would, and return its model."""
    torch.manual_seed(0)
    config = config_of(family, **_BYTES)
    if family.startswith("qwen3_5"):
        model = AutoModelForImageTextToText.from_config(_multimodal(config), dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    shake(model, seed=0)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model.eval()


def _multimodal(text: PreTrainedConfig) -> PreTrainedConfig:
    """Qwen3.5 is published, and known to SGLang, as the text part of a multimodal model."""
    vision = {
        "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": text.hidden_size,
        "num_position_embeddings": 16, "patch_size": 4,
    }  # fmt: skip
    outer = text.model_type.removesuffix("_text")
    return AutoConfig.for_model(
        outer, text_config={**text.to_dict(), "full_attention_interval": 4}, vision_config=vision, **_BYTES
    )


@torch.no_grad()
def expected_regular(model: PreTrainedModel, prompt_ids: Sequence[int], max_tokens: int) -> list[int]:
    """What Hugging Face's `generate` writes greedily; fails where two choices are too close to tell apart in float32."""
    made = model.generate(
        torch.tensor([prompt_ids]), max_new_tokens=max_tokens, do_sample=False, eos_token_id=None,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    best = torch.cat(made.logits).topk(2).values
    margin = float((best[:, 0] - best[:, 1]).min())
    assert margin > MARGIN, f"a choice hangs on {margin:.1e}; take another prompt"
    return made.sequences[0, len(prompt_ids) :].tolist()
