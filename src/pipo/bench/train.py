"""What a training step costs: time, and memory beside its estimate, at any shape, with random weights.

Three kinds of work are measured, each in processes of its own: the stage's step; a plain SFT step of the regular model over as many
tokens as there are slots; and one over half as many, whose backbone does as much as PIPO's. All train the same LoRA on the backbone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from pipo.bench.train_step import WORKS, TrainBench, Work
from pipo.errors import TrainingError
from pipo.model.convert import as_dtype
from pipo.model.shapes import base_without_weights, pipo_without_weights, shape_config
from pipo.training.config import OpdConfig
from pipo.training.lora import prepare_model
from pipo.training.memory import MemoryEstimate, StepSize, estimate_memory


@dataclass(frozen=True)
class WorkCost:
    """What one kind of step took. `seconds` of each step, over all processes that ran it.

    `peak_bytes`: at most, beyond what the libraries take; on a GPU, what the allocator gave out. `resting_bytes`: of these, what is
    there between steps (weights, gradients, optimizer, teacher).
    """

    num_tokens: int
    seconds: tuple[float, ...]
    peak_bytes: int
    resting_bytes: int

    @property
    def median_s(self) -> float:
        """The middle step."""
        return median(self.seconds)

    @property
    def tokens_per_s(self) -> float:
        """Slots, or tokens of a plain step, by the middle step."""
        return self.num_tokens / self.median_s

    def as_row(self) -> dict[str, Any]:
        """As JSON, with the figures that follow."""
        spread = {"median_s": self.median_s, "fastest_s": min(self.seconds), "slowest_s": max(self.seconds)}
        return {**asdict(self), **spread, "tokens_per_s": self.tokens_per_s}


@dataclass(frozen=True)
class TrainReport:
    """The cost of each kind of work, and the estimate of the stage's memory."""

    bench: TrainBench
    works: dict[Work, WorkCost]
    estimate: MemoryEstimate

    @property
    def estimate_error(self) -> float:
        """The estimated peak over the measured one, less one."""
        return self.estimate.peak_bytes / self.works["stage"].peak_bytes - 1

    def time_against(self, plain: Work) -> float:
        """The stage's middle step over a plain one's."""
        return self.works["stage"].median_s / self.works[plain].median_s

    def as_row(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "bench": asdict(self.bench),
            "works": {work: cost.as_row() for work, cost in self.works.items()},
            "time_against": {work: self.time_against(work) for work in WORKS[1:]},
            "estimate": asdict(self.estimate),
            "estimate_error": self.estimate_error,
        }


def estimate_of(bench: TrainBench) -> MemoryEstimate:
    """What `--plan` would say of the stage's step."""
    dtype = as_dtype(bench.dtype)
    model = pipo_without_weights(shape_config(bench.shape), dtype=dtype)
    prepare_model(model, bench.config.tuning, bench.stage)
    config, teacher = bench.config, None
    if isinstance(config, OpdConfig):
        teacher = base_without_weights(shape_config(bench.teacher), dtype)
    # The step that is measured here writes no rollouts.
    found = estimate_memory(config, model, teacher, size=StepSize(bench.slots, bench.batch), kernels=bench.device)
    phases = {name: peak for name, peak in found.phases.items() if name != "rollout"}
    return MemoryEstimate(max(phases.values()), found.peak_phase, found.components, phases, found.notes)


def bench_train(
    bench: TrainBench, *, num_steps: int = 5, rounds: int = 2, report: Callable[[], None] = lambda: None
) -> TrainReport:
    """Measure all kinds of work: memory once, then times in `rounds` turns of `num_steps` steps each.

    `report` is called after each of the `3 · (1 + rounds)` processes. On a GPU, memory and times come from the same processes.

    Raises:
        TrainingError: a process failed, by running out of memory for one; the message has its last line.
    """
    found: dict[Work, list[dict[str, Any]]] = {work: [] for work in WORKS}
    for turn in range(rounds + 1):
        for work in WORKS:
            found[work].append(_measure(bench, work, num_steps if turn else 1, memory=turn == 0))
            report()
    works = {work: _cost(runs) for work, runs in found.items()}
    return TrainReport(bench, works, estimate_of(bench))


def measure_memory(bench: TrainBench, work: Work = "stage") -> WorkCost:
    """One step's memory, in a process of its own; its time means nothing."""
    return _cost([_measure(bench, work, 1, memory=True)] * 2)


def _cost(runs: list[dict[str, Any]]) -> WorkCost:
    memory, *timed = runs
    seconds = tuple(second for run in timed for second in run["seconds"])
    return WorkCost(memory["num_tokens"], seconds, memory["peak_bytes"], memory["resting_bytes"])


def _measure(bench: TrainBench, work: Work, num_steps: int, *, memory: bool) -> dict[str, Any]:
    task = {
        "bench": asdict(bench),
        "work": work,
        "num_steps": num_steps,
        "memory": memory,
        "num_threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", "pipo.bench.train_step"]
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise TrainingError(f"the step {work!r} of shape {bench.shape} with {bench.slots} slots failed: {last}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
