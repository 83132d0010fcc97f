"""From a finished training to the checkpoints that the demo uses: bfloat16 weights, tokenizer, the records that made them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from pipo.demo.controls import NUM_PROBLEMS, lineage, measure_controls
from pipo.demo.recipe import Recipe, stage_model
from pipo.demo.tokenizer import build_tokenizer
from pipo.model.base import BaseForCausalLM
from pipo.model.modeling import PipoForCausalLM
from pipo.run_record import write_run_record

SHIPPED = {"pipo": "gate", "papers-gate": "opd", "regular": "regular", "teacher": "teacher"}
"""Checkpoints, and the stages whose models they are. The first two differ in the gate alone."""


def ship(
    recipe: Recipe, out: Path, checkpoints: Path, advance: Callable[[str], None], num_problems: int = NUM_PROBLEMS
) -> None:
    """Writes the checkpoints of `SHIPPED` and `controls.json` into `checkpoints`, from the stages in `out`."""
    for name, stage in SHIPPED.items():
        folder = checkpoints / name
        if folder.exists():
            shutil.rmtree(folder)
        loader = BaseForCausalLM if recipe.stage(stage).kind == "regular" else PipoForCausalLM
        model = loader.from_pretrained(stage_model(out, stage), dtype=torch.bfloat16)
        model.save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        write_run_record(folder / "run.json", {"stages": lineage(recipe, out, stage)})
    measure_controls(recipe, out, checkpoints / "controls.json", advance, num_problems)
