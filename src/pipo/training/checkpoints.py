"""Checkpoints of a run: whole or not there at all, and enough to go on as if nothing had happened.

A checkpoint is written into a hidden folder, brought to the disk, and renamed; its manifest, `checkpoint.json`, comes last. Beside the
weights (an adapter or a model that can be used as it is) it holds the optimiser, the schedule, the reports' sums and every process's random
state.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pipo.errors import CheckpointError
from pipo.model.files import read_json
from pipo.training import distributed
from pipo.training.lora import trained_parameters
from pipo.training.metrics import Meter
from pipo.training.weights import WeightWriter, read_trained

MANIFEST, STATE, OPTIMIZER, PROGRESS, ZERO = (
    "checkpoint.json",
    "trainer_state.json",
    "optimizer.pt",
    "progress.pt",
    "zero",
)
NAME = re.compile(r"checkpoint-\d+")
PARTIAL = ".partial-"


@dataclass
class RunState:
    """What of a trainer goes into a checkpoint."""

    model: nn.Module
    optimizer: Any
    scheduler: Any
    state: Any
    meter: Meter
    more_sums: Tensor | None = None
    """Sums of this process since the last report, beside the meter's."""
    engine: Any = None
    """DeepSpeed's, which shares the optimiser's state out and keeps it in files of its own."""


@contextmanager
def whole_folder(folder: Path, *, begun: bool = False) -> Iterator[Path]:
    """A hidden folder to write into, which becomes `folder` when the body ends, or goes when it fails.

    `begun`: it is there already, with something in it.

    Raises:
        CheckpointError: the disk is full, or can't be written for another reason; what was there before still is.
    """
    partial = partial_of(folder)
    try:
        if not begun:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        yield partial
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        _replace(partial, folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # The last two are how torch and safetensors report a full disk.
        if isinstance(error, OSError | RuntimeError | SafetensorError):
            raise CheckpointError(f"{folder} could not be written: {error}. Older checkpoints are untouched") from error
        raise


def partial_of(folder: Path) -> Path:
    """The hidden folder in which `folder` is written."""
    return folder.with_name(f"{PARTIAL}{folder.name}")


def _replace(partial: Path, folder: Path) -> None:
    """Rename `partial` to `folder`, which may be there already."""
    before = folder.with_name(f"{PARTIAL}before-{folder.name}")
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        folder.rename(before)
    try:
        os.replace(partial, folder)
    except OSError:
        if before.exists():
            before.rename(folder)
        raise
    _sync(folder.parent)
    shutil.rmtree(before, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a whole folder, which a kill in the middle of it must not leave half there under its name."""
    gone = folder.with_name(f"{PARTIAL}removed-{folder.name}")
    folder.rename(gone)
    shutil.rmtree(gone)


def _sync(path: Path) -> None:
    """Bring a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def step_of(checkpoint: Path) -> int:
    """The optimiser steps that a checkpoint comes after."""
    return int(checkpoint.name.rpartition("-")[2])


class Checkpoints:
    """The checkpoints in a run's folder. Every process calls every method; the main one writes."""

    def __init__(self, folder: Path, keep: int, writer: WeightWriter) -> None:
        """`keep`: how many to keep. `writer`: of the weights."""
        self.folder = folder
        self.keep = keep
        self.writer = writer

    def save(self, run: RunState) -> None:
        """Write the checkpoint of the step that the trainer is at, then remove the oldest above `keep`.

        Raises:
            CheckpointError: it could not be written; those before it are whole.
        """
        step = int(run.state.global_step)
        folder = self.folder / f"checkpoint-{step}"
        weights = self.writer.collect()
        optimizer = None if run.engine is not None else _optimizer_state(run)
        sums = distributed.add_ranks(run.meter.sums).cpu()
        progress = {
            "scheduler": run.scheduler.state_dict(),
            "sums": sums,
            "more_sums": None if run.more_sums is None else distributed.add_ranks(run.more_sums).cpu(),
            "random": distributed.gather_objects(_random_state()),
        }

        if run.engine is not None:  # every process writes its share
            distributed.on_main(lambda: (partial_of(folder) / ZERO).mkdir(parents=True))
            run.engine.save_checkpoint(str(partial_of(folder) / ZERO), tag="step", exclude_frozen_parameters=True)

        def write() -> None:
            with whole_folder(folder, begun=run.engine is not None) as partial:
                if optimizer is not None:
                    torch.save(optimizer, partial / OPTIMIZER)
                torch.save(progress, partial / PROGRESS)
                run.state.save_to_json(str(partial / STATE))
                self.writer.write(partial, weights)
                files = sorted(path for path in partial.rglob("*") if path.is_file())
                sizes = {str(path.relative_to(partial)): path.stat().st_size for path in files}
                manifest = {"step": step, "num_processes": distributed.num_processes(), "files": sizes}
                (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
            for old in self.all()[: -self.keep]:
                remove_folder(old)

        distributed.on_main(write)

    def all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted((path for path in self.folder.glob("*") if NAME.fullmatch(path.name)), key=step_of)

    def latest(self) -> Path | None:
        """The newest checkpoint, checked; None where there is none.

        Raises:
            CheckpointError: it was damaged after it was written, or is one of another number of processes.
        """
        paths = self.all()
        if not paths:
            return None
        manifest = read_json(paths[-1] / MANIFEST)
        for name, size in manifest["files"].items():
            path = paths[-1] / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                raise CheckpointError(
                    f"{path} is damaged: it should have {size} bytes, and has {found}; remove {paths[-1]} to go on from an earlier one"
                )
        if manifest["num_processes"] != distributed.num_processes():
            raise CheckpointError(
                f"{paths[-1]} is of a run on {manifest['num_processes']} processes and can't be continued on "
                f"{distributed.num_processes()}: start as many"
            )
        return paths[-1]

    def clean(self) -> None:
        """Remove what a killed process left behind."""
        for path in self.folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(path)

    def load_weights(self, path: Path, model: nn.Module) -> None:
        """Copy a checkpoint's weights into a prepared model, sharded or not."""
        targets = dict(trained_parameters(model))
        with torch.no_grad():
            for name, value in read_trained(path, targets):
                targets[name].copy_(distributed.share_of(value, targets[name]))

    def load(self, path: Path, run: RunState) -> None:
        """Take up weights, optimiser, schedule and the reports' sums."""
        if run.engine is None:
            self.load_weights(path, run.model)
            _load_optimizer(run, torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True))
        else:  # frozen weights are not in it
            run.engine.load_checkpoint(str(path / ZERO), tag="step", load_module_strict=False)
        progress = torch.load(path / PROGRESS, map_location="cpu", weights_only=True)
        run.scheduler.load_state_dict(progress["scheduler"])
        if distributed.is_main():  # the sums of all ranks
            run.meter.sums.copy_(progress["sums"])
            if run.more_sums is not None:
                run.more_sums.copy_(progress["more_sums"])

    def load_random_state(self, path: Path) -> None:
        """Take up this process's random state."""
        states = torch.load(path / PROGRESS, map_location="cpu", weights_only=True)["random"]
        _set_random_state(states[distributed.process_index()])


def _keep(kept: dict[str, Any], name: str, tensor: Tensor) -> None:
    value = distributed.whole(tensor)
    if distributed.is_main():
        kept[name] = value.to("cpu", copy=True)


def _optimizer_state(run: RunState) -> dict[str, Any]:
    """Its state by parameter name, whole; and the settings of its groups."""
    optimizer = run.optimizer
    names = {parameter: name for name, parameter in trained_parameters(run.model)}
    state: dict[str, dict[str, Any]] = {}
    for parameter, values in optimizer.state.items():
        entry = state.setdefault(names[parameter], {})
        for key, value in values.items():
            _keep(entry, key, value)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return {"state": state, "groups": groups}


def _load_optimizer(run: RunState, saved: dict[str, Any]) -> None:
    named = dict(trained_parameters(run.model))
    if set(saved["state"]) != set(named):
        raise CheckpointError("the optimiser's state is of other parameters than those that are trained")
    for group, settings in zip(run.optimizer.param_groups, saved["groups"], strict=True):
        group.update(settings)
    on_device = any(group.get("fused") or group.get("capturable") for group in run.optimizer.param_groups)
    for name, values in saved["state"].items():
        parameter = named[name]
        run.optimizer.state[parameter] = {key: _as_state(value, parameter, on_device) for key, value in values.items()}


def _as_state(value: Tensor, parameter: Tensor, on_device: bool) -> Tensor:
    if value.shape == parameter.shape:
        return distributed.share_of(value, parameter)
    return value.to(parameter.device) if on_device else value


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
