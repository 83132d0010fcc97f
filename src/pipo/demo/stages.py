"""The training loops of the demo: one stage, from its start or from where a killed run left off.

A stage's folder holds `state.pt` while it runs (weights, optimisers and losses so far, replaced atomically) and `model/` and
`run.json` once it is done. Batches and random numbers are functions of the step, so a resumed stage ends exactly where an
undisturbed one does.
"""

from __future__ import annotations

import os
import random
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config

from pipo.demo.batches import ExampleSource, paired_batch, regular_batch
from pipo.demo.distil import distil_losses, roll_out
from pipo.demo.gate import gather_drafts
from pipo.demo.recipe import Recipe, Stage, stage_folder, stage_model
from pipo.demo.tokenizer import build_tokenizer
from pipo.engine.llm import LLM
from pipo.model.base import BaseForCausalLM
from pipo.model.modeling import PipoForCausalLM
from pipo.run_record import write_run_record
from pipo.training.config import GateSettings
from pipo.training.gate_config import FitSettings
from pipo.training.gate_fit import fit_gate
from pipo.training.teacher import LocalTeacherModel

Losses = dict[str, Tensor]
LossOfStep = Callable[[int], Losses]
Report = Callable[[int, dict[str, float]], None]
"""Called after each step with the number of steps done and the step's losses."""

ATTENTION = "eager"
"""At these lengths the plain product of matrices is faster on a CPU than `sdpa`, most of all backwards."""

WARM_UP = 0.03
LOWEST_RATE = 0.02
CURVE_POINTS = 50


def run_stage(recipe: Recipe, stage: Stage, out: Path, report: Report) -> None:
    """Trains one stage to its end and writes its checkpoint and `run.json`. The stages it needs must be done."""
    stage.validate()
    folder = stage_folder(out, stage.name)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(_seed(recipe, stage, -1))
    model = _initial_model(recipe, stage, out)
    if stage.kind == "gate":
        curve, seconds = _fit_gate(model, recipe, stage, out, report)
    else:
        losses_of_step = _losses_of_step(recipe, stage, model, out)
        curve, seconds = _train(model, losses_of_step, recipe, stage, folder / "state.pt", report)
    model.save_pretrained(stage_model(out, stage.name))
    build_tokenizer().save_pretrained(stage_model(out, stage.name))
    record = {
        "stage": asdict(stage),
        "recipe": asdict(recipe),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "losses": curve if stage.kind == "gate" else _thin(curve),
    }
    write_run_record(folder / "run.json", record)
    (folder / "state.pt").unlink(missing_ok=True)


def _initial_model(recipe: Recipe, stage: Stage, out: Path) -> Any:
    if stage.start is None:
        config = Qwen3Config(**recipe.backbone_config(), attn_implementation=ATTENTION)
        model = BaseForCausalLM.from_config(config, mtp=True)
        _initialise(model, recipe.num_layers)
        return model
    path = stage_model(out, stage.start)
    if stage.kind == "regular":
        return BaseForCausalLM.from_pretrained(path, attn_implementation=ATTENTION)
    if recipe.stage(stage.start).kind == "regular":
        return PipoForCausalLM.from_base(path, attn_implementation=ATTENTION)
    model = PipoForCausalLM.from_pretrained(path, attn_implementation=ATTENTION)
    if stage.kind == "opd":
        model.set_gate(stage.gate_features)
    return model


def _initialise(model: nn.Module, num_layers: int) -> None:
    """Starting weights for training from nothing: scaled by fan-in, and near zero where a layer writes to the residual stream."""
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2:
            continue
        std = 0.02 if "embed" in name else 0.7 * parameter.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std = 0.02 * (2 * num_layers) ** -0.5
        nn.init.normal_(parameter, std=std)


def _losses_of_step(recipe: Recipe, stage: Stage, model: Any, out: Path) -> LossOfStep:
    source = ExampleSource(recipe, stage)

    def regular(step: int) -> Losses:
        ids_BT, labels_BT = regular_batch(source.batch(step))
        output = model(input_ids=ids_BT, labels=labels_BT)
        loss = output.backbone_loss + recipe.mtp_weight * output.mtp_loss
        return {"loss": loss, "backbone_loss": output.backbone_loss, "mtp_loss": output.mtp_loss}

    def sft(step: int) -> Losses:
        rng = random.Random(_seed(recipe, stage, step))
        ids_BT, labels_BT = paired_batch(source.batch(step), stage.max_pad_ratio, rng)
        output = model(input_ids=ids_BT, labels=labels_BT)
        return {name: output[name] for name in ("loss", "backbone_loss", "mtp_loss", "confidence_loss")}

    if stage.kind == "regular":
        return regular
    if stage.kind == "sft":
        return sft
    assert stage.teacher is not None
    teacher = _teacher(stage, out)
    engine = LLM(model, device="cpu", tokenizer=build_tokenizer(), max_num_seqs=recipe.batch_size)

    def opd(step: int) -> Losses:
        rng = random.Random(_seed(recipe, stage, step))
        rows = roll_out(engine, [example.prompt for example in source.batch(step)], rng)
        return distil_losses(model, teacher, rows, stage.gate_target)._asdict()

    return opd


def _teacher(stage: Stage, out: Path) -> LocalTeacherModel:
    assert stage.teacher is not None
    path = stage_model(out, stage.teacher)
    return LocalTeacherModel(BaseForCausalLM.from_pretrained(path, attn_implementation=ATTENTION))


def _fit_gate(
    model: PipoForCausalLM, recipe: Recipe, stage: Stage, out: Path, report: Report
) -> tuple[list[dict[str, float]], float]:
    """Gives the model a gate, and leaves all else. It takes minutes, so a killed one starts anew."""
    began = time.perf_counter()
    model.requires_grad_(False).eval()
    [drafts] = gather_drafts(model, [_teacher(stage, out)], recipe.seed, recipe.num_gate_rollouts, lambda _: None)
    curve: list[dict[str, float]] = []

    def on_row(row: dict[str, float]) -> None:
        curve.append({name: row[name] for name in ("step", "loss", "held_out_loss")})
        report(int(row["step"]), row)

    settings = GateSettings(features=stage.gate_features, target=stage.gate_target)
    fitted = fit_gate(model, drafts, settings, FitSettings(steps=stage.steps), seed=recipe.seed, on_row=on_row)
    model.set_gate(stage.gate_features, *fitted.calibration)
    model.confidence_head.load_state_dict(fitted.head.state_dict())
    return curve, time.perf_counter() - began


def _train(
    model: nn.Module, losses_of_step: LossOfStep, recipe: Recipe, stage: Stage, state: Path, report: Report
) -> tuple[list[dict[str, float]], float]:
    """Runs the steps that are left. Gives the losses of every step and the seconds they took, killed attempts included."""
    optimizers = _optimizers(model, stage)
    curve: list[dict[str, float]] = []
    seconds = 0.0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, content in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        curve, seconds = saved["curve"], saved["seconds"]
    model.train()
    for step in range(len(curve), stage.steps):
        began = time.perf_counter()
        torch.manual_seed(_seed(recipe, stage, step))
        losses = losses_of_step(step)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * rate(step / stage.steps, stage.decay)
            optimizer.step()
            optimizer.zero_grad()
        curve.append({name: value.item() for name, value in losses.items()})
        seconds += time.perf_counter() - began
        if (step + 1) % recipe.save_every == 0:
            content = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "curve": curve,
                "seconds": seconds,
            }
            partial = state.with_suffix(".partial")
            torch.save(content, partial)
            os.replace(partial, state)
        report(step + 1, curve[-1])
    return curve, seconds


def _optimizers(model: nn.Module, stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices, AdamW for embeddings, norms, biases and vectors."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = (
            parameter.ndim == 2
            and min(parameter.shape) > 1
            and not name.endswith(("embed_tokens.weight", "lm_head.weight"))
        )
        (matrices if is_matrix else others).append(parameter)
    muon = torch.optim.Muon(
        matrices, lr=stage.matrix_lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, lr=stage.other_lr, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer, lr in ((muon, stage.matrix_lr), (adamw, stage.other_lr)):
        for group in optimizer.param_groups:
            group["full_lr"] = lr
    return [muon, adamw]


def rate(done: float, decay: float) -> float:
    """Share of the full learning rate after the share `done` of the steps: warm-up, constant, linear decay."""
    if done < WARM_UP:
        return max(done / WARM_UP, 0.01)
    left = 1.0 - done
    return LOWEST_RATE + (1 - LOWEST_RATE) * left / decay if left < decay else 1.0


def _seed(recipe: Recipe, stage: Stage, step: int) -> int:
    return zlib.crc32(f"{recipe.seed}-{stage.draws or stage.name}-{step}".encode())


def _thin(curve: list[dict[str, float]]) -> list[dict[str, float]]:
    """The curve as about `CURVE_POINTS` means over neighbouring steps."""
    width = max(1, len(curve) // CURVE_POINTS)
    points = []
    for first in range(0, len(curve), width):
        part = curve[first : first + width]
        means = {name: round(sum(losses[name] for losses in part) / len(part), 5) for name in part[0]}
        points.append({"step": first + len(part), **means})
    return points
