"""Tiny checkpoints of each kind, written once a session; tests that break one work on a copy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from families import base_model, pipo_model

Tensors = dict[str, Tensor]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A folder with a `pipo`, `reference`, `nested` or `base` checkpoint of a family. Not to be written to."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(kind: str, family: str = "qwen3_5") -> Path:
        folder = root / f"{kind}-{family}"
        if folder.exists():
            return folder
        if kind == "base":
            base_model(family).save_pretrained(folder)
        elif kind == "pipo":
            pipo_model(family).save_pretrained(folder)
        else:
            pipo_model(family).export_reference(folder, nested=kind == "nested")
        return folder

    return make


@pytest.fixture
def changed(checkpoints: Callable[[str, str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a checkpoint with its tensors, or its config, changed by a function."""

    def make(
        kind: str,
        family: str = "qwen3_5",
        *,
        tensors: Callable[[Tensors], Any] | None = None,
        config: Callable[[dict[str, Any]], Any] | None = None,
    ) -> Path:
        folder = tmp_path / f"{kind}-{family}-changed"
        shutil.copytree(checkpoints(kind, family), folder)
        if tensors is not None:
            held = load_file(folder / "model.safetensors")
            tensors(held)
            save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        if config is not None:
            raw = json.loads((folder / "config.json").read_text())
            config(raw)
            (folder / "config.json").write_text(json.dumps(raw))
        return folder

    return make
