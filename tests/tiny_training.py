"""Tiny runs of training on slots made on the spot, in this process or in others (`python tiny_training.py JOBS`)."""

import contextlib
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

from tiny_checkpoints import make_checkpoints

NUM_EXAMPLES = 13
PAD_ID = 256


class TinySlots:
    """Slots of random bytes, of different lengths, augmented anew in each epoch."""

    def __init__(self, num_examples: int = NUM_EXAMPLES) -> None:
        self.num_examples = num_examples
        self.epoch = 0
        self.lengths = [len(self._slots(i).ids) for i in range(num_examples)]

    def __len__(self) -> int:
        return self.num_examples

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> Any:
        from pipo.pairing import split_pairs

        rng = random.Random(f"{self.epoch}-{index}")
        return split_pairs(self._slots(index), rng.uniform(0, 0.5), rng, PAD_ID)

    def _slots(self, index: int) -> Any:
        from pipo.pairing import slots_from_turns

        rng = random.Random(index)
        prompt, answer = ([rng.randrange(256) for _ in range(n)] for n in (rng.randint(1, 6), rng.randint(5, 14)))
        return slots_from_turns([(prompt, False), (answer, True)], PAD_ID)


def collate(rows: list[Any]) -> dict[str, Any]:
    import torch

    width = max(len(row.ids) for row in rows)

    def padded(lists: list[list[int]], filler: int) -> Any:
        return torch.tensor([[*values, *[filler] * (width - len(values))] for values in lists])

    return {
        "input_ids": padded([row.ids for row in rows], PAD_ID),
        "attention_mask": padded([[1] * len(row.ids) for row in rows], 0),
        "labels": padded([row.labels for row in rows], -100),
    }


def checkpoints(folder: Path) -> tuple[Path, Path]:
    """`(base, pipo)`."""
    return make_checkpoints(folder)


def settings(base: Path, out: Path, **groups: dict[str, Any]) -> Any:
    """Settings of a run of 6 steps: 13 examples, 2 in a batch, 2 batches in a step."""
    from pipo.training.config import SftConfig

    content: dict[str, dict[str, Any]] = {
        "model": {"path": str(base), "dtype": "float32"},
        "data": {"train": "tiny"},
        "run": {
            "out": str(out),
            "batch_size": 2,
            "accumulation": 2,
            "max_steps": 6,
            "save_every": 2,
            "device": "cpu",
            "gradient_checkpointing": False,
        },
        "tuning": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "optimizer": {"lr": 1e-2},
    }
    for name, group in groups.items():
        content[name] = {**content.get(name, {}), **group}
    return SftConfig.model_validate(content)


def train(config: Any, *, resume: bool = False, watch: Any = None, trainer: Any = None) -> dict[str, Any]:
    from pipo.training.run import Task, run_training
    from pipo.training.trainer import PipoTrainer

    task = Task("sft", lambda setup: TinySlots(), lambda setup: collate, trainer=trainer or PipoTrainer)  # type: ignore[arg-type]
    return run_training(task, config, resume=resume, watch=watch)


def metrics(out: Path) -> list[dict[str, Any]]:
    """The rows of a run without what depends on the clock."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "slots_per_s")} for row in rows]


class StoppedError(Exception):
    """A run was stopped on purpose, in every process."""


def stopping_after(step: int) -> Any:
    """A trainer that stops once its checkpoint of `step` is written."""
    from pipo.training.trainer import PipoTrainer

    class Stopping(PipoTrainer):
        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            super()._save_checkpoint(model, trial)
            if self.state.global_step == step:
                raise StoppedError

    return Stopping


def run_until(base: str, out: str, moment: int | float | None, counted: Any) -> None:
    """Train or go on; die by SIGKILL at the given event in the run's folder (an int), or after so many seconds (a float).

    Events are what Python sees of the file system: files opened, renamed and removed. `counted`: a shared integer, how many there were.
    """
    import torch

    torch.set_num_threads(1)

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if event.partition(".")[0] in ("open", "os", "shutil") and any(out in str(a) for a in arguments):
            counted.value += 1
            if counted.value == moment:
                die()

    sys.addaudithook(count)
    if isinstance(moment, float):
        signal.signal(signal.SIGALRM, die)
        signal.setitimer(signal.ITIMER_REAL, moment)
    train(settings(Path(base), Path(out), run={"save_every": 1}), resume=True)


def main() -> None:
    """Run the jobs of a JSON list, one after the other: `{base, out, groups, resume, stop_after}`."""
    from pipo.training import distributed

    for job in json.loads(sys.argv[1]):
        stop = job.get("stop_after")
        config = settings(Path(job["base"]), Path(job["out"]), **job.get("groups", {}))
        with contextlib.suppress(StoppedError):
            train(config, resume=job.get("resume", False), trainer=stop and stopping_after(stop))
    distributed.stop()


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    main()
