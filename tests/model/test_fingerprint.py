"""The fingerprint of a base: the weights' own, whatever file they lie in."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipo.errors import CheckpointError
from pipo.model.files import write_checkpoint
from pipo.model.fingerprint import base_fingerprint

Checkpoints = Callable[..., Path]


@pytest.fixture
def folder(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    copy = tmp_path / "base"
    shutil.copytree(checkpoints("base", "qwen3_5"), copy)
    return copy


def test_shards_and_prefixes_change_nothing(folder: Path, tmp_path: Path) -> None:
    """Breaks when the same weights, downloaded or re-saved in another way, are taken for another base."""
    before = base_fingerprint(folder)
    assert len(before) == 64
    tensors = load_file(folder / "model.safetensors")
    write_checkpoint(tmp_path / "shards", tensors, {}, max_shard_size=100_000)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert base_fingerprint(tmp_path / "shards") == before
    nested = {
        k.replace("model.", "model.language_model.", 1) if k.startswith("model.") else k: v for k, v in tensors.items()
    }
    write_checkpoint(tmp_path / "nested", {**nested, "model.visual.x": torch.ones(3)}, {})
    assert base_fingerprint(tmp_path / "nested") == before


@pytest.mark.parametrize("part", ["first", "last", "dtype", "shape", "name", "absent"])
def test_other_weights_have_another(part: str, folder: Path) -> None:
    """Breaks when an adapter could be put on a base that was tuned further, cut or converted."""
    before = base_fingerprint(folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    if part in ("first", "last"):
        tensors[name].view(-1)[0 if part == "first" else -1] += 1e-4
    elif part == "dtype":
        tensors[name] = tensors[name].half()
    elif part == "shape":
        tensors[name] = tensors[name].T.contiguous()
    elif part == "name":
        tensors["other"] = tensors.pop(name)
    else:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    assert base_fingerprint(folder) != before


def test_unreadable_weights_have_none(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="can't be read as safetensors"):
        base_fingerprint(folder)
