"""Gates fitted on a frozen model: its drafts, drawn once, what a teacher thinks of each, and a head for every pair of features and
target.

A head is a safetensors file whose metadata hold its calibration.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from pipo.demo.gate import gather_drafts
from pipo.demo.recipe import stage_model
from pipo.demo.study.plan import Gate, Study
from pipo.demo.tokenizer import PAD_ID
from pipo.model.base import BaseForCausalLM
from pipo.model.modeling import PipoForCausalLM
from pipo.training.config import GateSettings
from pipo.training.gate_config import FitSettings
from pipo.training.gate_fit import FittedGate, fit_gate
from pipo.training.self_teacher import SelfTeacherModel
from pipo.training.teacher import LocalTeacherModel, TeacherModel


def fit_gates(study: Study, folder: Path, name: str, gates: Sequence[Gate], say: Callable[[str], None]) -> None:
    """Fits `gates` on the model of stage `name` in a seed's folder, and writes a head for each."""
    seed = study.recipe.seed
    model = PipoForCausalLM.from_pretrained(stage_model(folder, name)).requires_grad_(False).eval()
    teachers: list[TeacherModel] = [LocalTeacherModel(BaseForCausalLM.from_pretrained(stage_model(folder, "teacher")))]
    if not all(gate.by_teacher for gate in gates):
        teachers.append(SelfTeacherModel(model, PAD_ID))
    gathered = gather_drafts(model, teachers, seed, study.num_gate_rollouts, say)
    for gate in gates:
        say(f"fitting {gate.label}")
        drafts = gathered[0 if gate.by_teacher else 1]
        settings = GateSettings(features=gate.features, target=gate.target)
        fitted = fit_gate(model, drafts, settings, fit_settings(study), seed=seed)
        _write_head(head_path(folder, name, gate), fitted, len(drafts))


def fit_settings(study: Study) -> FitSettings:
    """Those of the gate stage, with the study's number of steps."""
    return FitSettings(steps=study.gate_steps)


def head_path(folder: Path, name: str, gate: Gate) -> Path:
    """Where the head of a gate on a model lies."""
    return folder / "gates" / f"{name}.{gate.name}.safetensors"


def put_head(model: PipoForCausalLM, path: Path, gate: Gate) -> None:
    """Gives `model` a fitted gate."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    model.set_gate(gate.features, about["scale"], about["offset"])
    model.confidence_head.load_state_dict(weights)


def read_figures(path: Path) -> dict[str, Any]:
    """What the fit reported of a head, on drafts that it did not see."""
    with safe_open(path, framework="pt") as file:
        about: dict[str, Any] = json.loads(file.metadata()["about"])
    return about


def _write_head(path: Path, fitted: FittedGate, num_drafts: int) -> None:
    scale, offset = fitted.calibration
    about: dict[str, Any] = {"scale": scale, "offset": offset, "num_drafts": num_drafts, "best_step": fitted.best_step}
    about["held_out"] = asdict(fitted.after)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    weights = {name: tensor.contiguous() for name, tensor in fitted.head.state_dict().items()}
    save_file(weights, partial, metadata={"about": json.dumps(about)})
    os.replace(partial, path)
