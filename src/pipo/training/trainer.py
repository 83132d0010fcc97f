"""`PipoTrainer`: transformers' loop around a PIPO model's losses.

Of transformers it takes the loop, the wrapping for several processes, the optimiser and its schedule. Its own are what a loss is
divided by, what a step reports, the order of the examples, and checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from pipo.errors import TrainingError
from pipo.losses.pair import NumItems, PairObjective, SupervisedObjective
from pipo.model.modeling import PipoForCausalLM, PipoOutput
from pipo.pairing import IGNORE_INDEX, TOKEN1_LABELS, TOKEN2_LABELS
from pipo.training import distributed
from pipo.training.batches import EpochLoader, make_loader
from pipo.training.checkpoints import Checkpoints, RunState
from pipo.training.config import TrainingConfig
from pipo.training.metrics import Meter
from pipo.training.schedule import rate

Row = dict[str, float]
MODEL_INPUTS = ("input_ids", "attention_mask", "labels")
END_OF_TRAINING = "train_runtime"


class LastReport(TrainerCallback):
    """The last steps are reported, too, where they are fewer than `run.log_every`."""

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Called by the loop."""
        if state.global_step >= state.max_steps:
            control.should_log = True


class PipoTrainer(Trainer):
    """Trains a prepared model (`pipo.training.lora`) on micro-batches of slots.

    A subclass that trains on something else overrides :meth:`get_batch_samples`, which makes the micro-batches of an optimiser step,
    :meth:`objective`, which says what is asked of each, and :meth:`extra_metrics`.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PipoForCausalLM,
        args: TrainingArguments,
        *,
        settings: TrainingConfig,
        train_dataset: Any,
        collate: Callable[[list[Any]], Any],
        checkpoints: Checkpoints,
        on_row: Callable[[Row], None] = lambda row: None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        """`collate` makes a micro-batch of examples. `on_row` gets each reported step, in the main process only."""
        super().__init__(
            model, args, data_collator=collate, train_dataset=train_dataset, callbacks=[LastReport(), *callbacks]
        )
        # Losses come divided by the positions of the whole step.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)
        self.settings = settings
        self.checkpoints = checkpoints
        self.meter = Meter(args.device)
        self._on_row = on_row
        self._reported_at = time.perf_counter()
        if settings.run.strategy == "fsdp2":
            distributed.shard(model, args.device)

    # --- what a subclass may override

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Mapping[str, Any]], NumItems]:
        """The micro-batches of an optimiser step, and the supervised positions of them all, on all ranks."""
        samples: list[Mapping[str, Any]] = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        return samples, self.count_items([sample["labels"] for sample in samples])

    def objective(self, inputs: Mapping[str, Any], num_items: NumItems) -> PairObjective:
        """What is asked of both heads and the gate on one micro-batch, which is on the device."""
        weights = self.settings.loss
        return SupervisedObjective(num_items, weights.mtp_weight, weights.confidence_weight)

    def extra_metrics(self) -> Row:
        """Figures beside the usual ones for the step being reported, the same on all ranks. Called on all ranks."""
        return {}

    def extra_sums(self) -> Tensor | None:
        """The sums of this process that :meth:`extra_metrics` reads, which go into checkpoints and are filled from them."""
        return None

    # --- the loss

    def count_items(self, labels: Sequence[Tensor]) -> NumItems:
        """Supervised positions of both heads in micro-batches of labels `[B, T]`, summed over all ranks."""
        counts = torch.zeros(2, dtype=torch.long, device=self.args.device)
        for labels_BT in labels:
            for i, steps in enumerate((TOKEN1_LABELS, TOKEN2_LABELS)):
                counts[i] += (labels_BT[:, steps] != IGNORE_INDEX).sum().to(counts.device)
        token1, token2 = distributed.add_ranks(counts).clamp_min(1)  # a step without any has a loss of zero
        num_items = NumItems(token1, token2)
        if distributed.is_main():
            self.meter.add_step(num_items)
        return num_items

    def autocast(self) -> torch.autocast:
        """The context in which the model computes; bfloat16 where its frozen weights are."""
        narrow = self.settings.model.dtype == "bfloat16"
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=narrow)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """A micro-batch's share of the step's loss, times the number of processes: their gradients are averaged."""
        objective = self.objective(inputs, cast(NumItems, num_items_in_batch))
        with self.autocast():
            output: PipoOutput = model(**{name: inputs[name] for name in MODEL_INPUTS}, objective=objective)
        assert output.loss is not None
        self.meter.add(output, inputs["attention_mask"].sum())
        loss = output.loss * distributed.num_processes()
        return (loss, output) if return_outputs else loss

    # --- data, optimiser, wrapping

    def get_train_dataloader(self) -> EpochLoader:
        """This process's micro-batches. See :mod:`pipo.training.batches`."""
        return make_loader(
            self.train_dataset,
            self.settings.run,
            self.data_collator,
            num_workers=self.settings.data.num_workers,
            process=self.args.process_index,
            num_processes=self.args.world_size,
            pin_memory=self.args.device.type == "cuda",
        )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay is for matrices; norms and biases have none."""
        return [name for name, parameter in model.named_parameters() if parameter.dim() >= 2]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """See :mod:`pipo.training.schedule`."""
        settings = self.settings.optimizer
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer, lambda step: rate(min(step, num_training_steps), num_training_steps, settings)
        )
        return self.lr_scheduler

    def create_accelerator_and_postprocess(self) -> None:
        """As in the base class; but a model that is sharded here is not wrapped once more."""
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_model

        def prepare_unless_sharded(model: nn.Module, **options: Any) -> nn.Module:
            if distributed.is_sharded(model):
                return model
            return cast(nn.Module, prepare(model, **options))

        self.accelerator.prepare_model = prepare_unless_sharded

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        distributed.check_strategy(self.settings.run, self.model_wrapped)
        if resume_from_checkpoint is not None:
            self.checkpoints.load(Path(resume_from_checkpoint), self._run_state())
        return prepared

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> float:
        norm = super()._get_grad_norm(*args, **kwargs)
        value = float(distributed.whole(norm)) if isinstance(norm, Tensor) else float(norm)
        if not isfinite(value):
            raise TrainingError(
                f"step {self.state.global_step + 1}: the gradient is not finite ({value}); checkpoints are of the steps before. "
                "Lower optimizer.lr, or look at the examples of this step"
            )
        return value

    # --- reports

    def log(self, logs: Row, start_time: float | None = None) -> None:
        """Report the steps since the last report, to `on_row` and the trackers."""
        if END_OF_TRAINING in logs:
            return
        now = time.perf_counter()
        seconds, self._reported_at = now - self._reported_at, now
        row = {**self.meter.row(distributed.add_ranks), **self.extra_metrics()}
        row |= {"grad_norm": logs["grad_norm"], "lr": logs["learning_rate"], "seconds": seconds}
        row["slots_per_s"] = row["num_slots"] / seconds
        super().log(row)
        self.state.log_history.clear()  # metrics.jsonl has it, and every checkpoint would carry it
        if distributed.is_main():
            self._on_row({"step": self.state.global_step, **row})

    # --- checkpoints

    def _run_state(self) -> RunState:
        engine = self.model_wrapped if self.is_deepspeed_enabled else None
        return RunState(
            self.model, self.optimizer, self.lr_scheduler, self.state, self.meter, self.extra_sums(), engine
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.checkpoints.save(self._run_state())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Weights are loaded with everything else, once the model is ready to train."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.checkpoints.load_random_state(Path(checkpoint))
