"""A stock checkpoint as a GGUF file, for llama.cpp: weights and sizes, no vocabulary, since prompts are token ids.

Tensors keep their bits: what is bfloat16 stays so, and the few vectors are written as float32, the way llama.cpp reads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

KINDS = {
    "BF16": ("bfloat16", np.uint16, gguf.GGMLQuantizationType.BF16),
    "F16": ("float16", np.float16, gguf.GGMLQuantizationType.F16),
    "F32": ("float32", np.float32, gguf.GGMLQuantizationType.F32),
}
"""By safetensors' name: torch's name, how numpy holds it, and GGUF's."""

# Families whose tensors go over as they are. (llama.cpp's converter, which permutes or splits those of others, is in no package.)
FAMILIES = {"qwen3": gguf.MODEL_ARCH.QWEN3}


def write_gguf(folder: Path, path: Path, dtype: str) -> None:
    """Write the checkpoint in `folder` to `path`.

    Raises:
        ValueError: a family that can't be written so, or weights of another dtype.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = config["model_type"]
    if family not in FAMILIES:
        raise ValueError(f"only {', '.join(FAMILIES)} can be written as GGUF here, and this model is {family!r}")
    architecture = FAMILIES[family]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _write_sizes(writer, config)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for name, kind, array in _tensors(folder):
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ValueError(f"GGUF has no name for the tensor {name}")
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        stored, _, raw = KINDS[kind]
        if array.ndim == 1:
            writer.add_tensor(target, _as_float32(array, kind))
        elif stored != dtype:
            raise ValueError(f"{name} is stored as {stored}, and llama.cpp runs what is stored, not {dtype}")
        else:
            writer.add_tensor(target, array.view(np.uint8) if kind == "BF16" else array, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_sizes(writer: Any, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _tensors(folder: Path) -> Iterator[tuple[str, str, NDArray[Any]]]:
    """Name, safetensors' dtype and values; numpy has no bfloat16, so those come as 16-bit integers."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        data = np.memmap(path, np.uint8, "r", offset=8 + size)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in KINDS:
                raise ValueError(f"{name} is stored as {entry['dtype']}, which can't be written as GGUF here")
            begin, end = entry["data_offsets"]
            yield name, entry["dtype"], data[begin:end].view(KINDS[entry["dtype"]][1]).reshape(entry["shape"])


def _as_float32(array: NDArray[Any], kind: str) -> NDArray[np.float32]:
    if kind == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)
