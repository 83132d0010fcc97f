"""One kind of training step, built with random weights and run over and over in this process. `train.py` starts such processes.

Shape legend: B batch, T slots, N tokens of a text.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from pipo.bench.meter import open_meter
from pipo.errors import ConfigError
from pipo.losses import DistilledObjective, PairObjective, SupervisedObjective
from pipo.model.backbone import build_causal_lm, checkpoint_activations
from pipo.model.base import BaseForCausalLM
from pipo.model.config import PipoConfig
from pipo.model.convert import as_dtype
from pipo.model.modeling import PipoForCausalLM
from pipo.model.shapes import SHAPES, shape_config
from pipo.pairing import Slots
from pipo.training.config import OpdConfig, SftConfig, TrainingConfig
from pipo.training.lora import add_lora, lora_layers, prepare_model
from pipo.training.teacher import LocalTeacherModel

Stage = Literal["sft", "opd"]
Work = Literal["stage", "plain", "plain_half"]
WORKS: tuple[Work, ...] = ("stage", "plain", "plain_half")


@dataclass(frozen=True)
class TrainBench:
    """What is measured: `batch` rows of `slots` slots, all of them supervised, on a shape of `pipo.model.shapes`."""

    shape: str
    stage: Stage = "sft"
    slots: int = 2048
    batch: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    teacher_shape: str | None = None
    rank: int = 64
    mode: Literal["full", "topk", "sampled"] = "topk"
    """OPD's divergence."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for sizes that can't be."""
        for name in (self.shape, self.teacher):
            shape_config(name)
        if self.slots < 4 or self.slots % 2:
            raise ConfigError(f"slots must be an even number of at least 4, got {self.slots}")
        if self.stage == "sft" and (self.teacher_shape is not None or self.mode != "topk"):
            raise ConfigError(
                "teacher shape and divergence are OPD's, and SFT has neither: choose stage opd, or leave them out"
            )
        if self.batch < 1:
            raise ConfigError(f"batch must be at least 1, got {self.batch}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device cuda was asked for, and torch finds no GPU here")

    @property
    def teacher(self) -> str:
        """The shape of OPD's teacher, by default the student's."""
        return self.teacher_shape or self.shape

    @property
    def config(self) -> TrainingConfig:
        """The settings of such a run, with the paper's for everything else."""
        run = {"out": "unused", "batch_size": self.batch, "device": self.device}
        model = {"path": self.shape, "shape": self.shape, "dtype": self.dtype}
        tuning = {"rank": self.rank, "alpha": 2 * self.rank}
        if self.stage == "sft":
            data: dict[str, Any] = {"train": "unused", "max_slots": self.slots}
            return SftConfig.model_validate({"model": model, "tuning": tuning, "run": run, "data": data})
        return OpdConfig.model_validate(
            {
                "model": model,
                "tuning": tuning,
                "run": run,
                "data": {"train": "unused", "max_prompt_tokens": 2},
                "rollout": {"max_slots": self.slots - 2},
                "teacher": {"path": self.teacher, "shape": self.teacher, "dtype": self.dtype},
                "divergence": {"mode": self.mode},
            }
        )


class Step:
    """A model in training, its optimizer, and one batch of random rows."""

    def __init__(self, bench: TrainBench, work: Work) -> None:
        self.bench, self.work = bench, work
        self.config = bench.config
        self.device = torch.device(bench.device)
        torch.manual_seed(0)
        self.model = self._build().to(self.device).train()
        checkpoint_activations(self.model if work == "stage" else self.model.model)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=True)
        length = bench.slots // 2 if work == "plain_half" else bench.slots
        vocab_size = self.model.config.vocab_size
        self.ids_BT = torch.randint(vocab_size, (bench.batch, length)).to(self.device)
        self.rows = [Slots(ids, ids, [False] * length) for ids in self.ids_BT.tolist()]

    def _build(self) -> Any:
        dtype, tuning = as_dtype(self.bench.dtype), self.config.tuning
        causal_lm = build_causal_lm(shape_config(self.bench.shape), dtype)
        if self.work == "stage":
            pipo = PipoForCausalLM(PipoConfig(causal_lm.config), causal_lm=causal_lm)
            prepare_model(pipo, tuning, self.bench.stage)
            return pipo
        model = BaseForCausalLM(causal_lm, mtp=False).requires_grad_(False)
        # peft asks a model that it adapts for what only transformers' own have: the decoder is one of these.
        add_lora(model.model, [name.removeprefix("model.") for name in lora_layers(model, tuning)[0]], tuning)
        return model

    @cached_property
    def teacher(self) -> LocalTeacherModel:
        """OPD's teacher."""
        config = shape_config(self.bench.teacher)
        model = BaseForCausalLM.from_config(config, mtp=False, dtype=self.bench.dtype)
        return LocalTeacherModel(model, self.model.config.vocab_size, device=self.device)

    def settle(self) -> None:
        """Make gradients, the optimizer's states and the teacher, which stay from here on."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        if isinstance(self.config, OpdConfig) and self.work == "stage":
            _ = self.teacher

    def objective(self) -> PairObjective:
        """The stage's losses; a teacher reads the batch first."""
        if not isinstance(self.config, OpdConfig):
            return SupervisedObjective()
        return DistilledObjective(*self.teacher.targets(self.rows), mode=self.bench.mode)

    def run(self) -> None:
        """Forward, backward, clipping, AdamW: the trainer's step, with one micro-batch."""
        low = self.bench.dtype == "bfloat16"
        arguments: dict[str, Any] = {"objective": self.objective()} if self.work == "stage" else {}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
            mask_BT = torch.ones_like(self.ids_BT)
            loss: Tensor = self.model(self.ids_BT, attention_mask=mask_BT, labels=self.ids_BT, **arguments).loss
        del arguments
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        for parameter in self.parameters:  # kept, as between the micro-batches of a step
            assert parameter.grad is not None
            parameter.grad.zero_()


def measure(bench: TrainBench, work: Work, num_steps: int, *, memory: bool) -> dict[str, Any]:
    """Run `num_steps` steps: `seconds` of each, `peak_bytes` and `resting_bytes`, `num_tokens` of a step.

    `memory`: no step warms up; and on a CPU every freed block goes back to the system at once, so that figures are those of the
    tensors. That is slow, and the seconds mean nothing.
    """
    if memory:  # what libraries load and keep on their first step is not the model's
        small = "tiny-hybrid" if "linear_num_value_heads" in SHAPES[bench.shape].fields else "tiny"
        Step(replace(bench, shape=small, teacher_shape=None, slots=8, batch=1), work).run()
    meter = open_meter(bench.device, memory)
    step = Step(bench, work)
    step.settle()
    if not memory:
        step.run()
    meter.start()
    resting = meter.used_bytes()
    seconds: list[float] = []
    for _ in range(num_steps):
        start = meter.seconds()
        step.run()
        seconds.append(meter.seconds() - start)
    return {
        "seconds": seconds,
        "peak_bytes": meter.peak_bytes(),
        "resting_bytes": resting,
        "num_tokens": step.ids_BT.numel(),
    }


def main() -> None:
    """Measure what standard input asks for, `{"bench": …, "work": …, "num_steps": …, "memory": …}`, and print it as JSON."""
    task = json.load(sys.stdin)
    torch.set_num_threads(task["num_threads"])
    found = measure(TrainBench(**task["bench"]), task["work"], task["num_steps"], memory=task["memory"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
