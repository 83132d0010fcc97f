"""New weights for a running server: a checkpoint that does not fit is turned down before anything is overwritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipo.errors import PipoError, UnsupportedModelError
from pipo.integrations.sglang.config import read
from pipo.integrations.sglang.hooks import Hook
from pipo.integrations.sglang.serving import Served, current, served
from pipo.integrations.sglang.weights import Checklist, expected_shapes
from pipo.model.config import PipoConfig
from pipo.model.files import WeightFiles, find_checkpoint

Update = Callable[..., tuple[bool, str]]
MUST_AGREE = ("compressor_type", "pad_token_id", "confidence_features", "confidence_scale", "confidence_offset")
"""Settings of a checkpoint that its weights were trained or fitted with, and that a running server keeps."""


def around_update_from_disk(
    update: Update,
    updater: Any,
    model_path: str,
    load_format: str,
    weight_name_filter: Callable[[str], bool] | None = None,
    recapture_cuda_graph: bool = False,
) -> tuple[bool, str]:
    """SGLang writes over the old weights while it reads the new ones, and does not find back to the old."""
    if served() is not None:
        try:
            refuse_unfit(model_path, current(), weight_name_filter)
        except PipoError as error:
            return False, f"The server keeps its weights: {error}"
    return update(updater, model_path, load_format, weight_name_filter, recapture_cuda_graph)


def refuse_unfit(model_path: str, now: Served, name_filter: Callable[[str], bool] | None = None) -> None:
    """Check a checkpoint's settings, names and shapes against what is served. No tensor is copied.

    Raises:
        CheckpointError: unreadable, or tensors that do not fit. UnsupportedModelError: a checkpoint of another kind.
    """
    folder = find_checkpoint(model_path)
    config, has_vision = read(str(folder), None, {})
    _refuse_other_settings(config, now.config)
    checklist = Checklist(expected_shapes(now.config), tied=bool(now.config.tie_word_embeddings), has_vision=has_vision)
    tensors = (
        (name, tensor) for name, tensor in WeightFiles(folder).read() if name_filter is None or name_filter(name)
    )
    for _ in checklist.check(tensors, whole=name_filter is None):
        pass


def _refuse_other_settings(config: PipoConfig, now: PipoConfig) -> None:
    if differing := [name for name in MUST_AGREE if getattr(config, name) != getattr(now, name)]:
        told = ", ".join(f"{name} is {getattr(config, name)}, not {getattr(now, name)}" for name in differing)
        raise UnsupportedModelError(f"the new checkpoint's {told}; start a server with it")


HOOKS = (
    Hook(
        "model_executor.model_runner_components.weight_updater.WeightUpdater.update_weights_from_disk",
        "around",
        around_update_from_disk,
        ("self", "model_path", "load_format", "weight_name_filter", "recapture_cuda_graph"),
    ),
)
