"""Which examples each step reads: an order drawn from seed and epoch, dealt out to processes, forwards and steps.

An optimiser step reads `batch_size · accumulation · processes` consecutive examples of the epoch's order, however these are split up.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence, Sized
from math import ceil
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from pipo.training.config import RunSettings

LENGTH_WINDOW = 50
"""Steps whose examples are sorted by length among themselves."""


class Again(int):
    """Index of an example that another process has already: it fills a batch, and must have no loss."""


class EpochBatches:
    """Batches of indices of one process, in the order of an epoch.

    The last batch of an epoch may be smaller. Where it can't be shared evenly, its first examples fill it: :class:`Again`.
    """

    def __init__(
        self,
        dataset: Sized,
        run: RunSettings,
        *,
        process: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.dataset = dataset
        self.run = run
        self.process, self.num_processes = process, num_processes
        self.epoch = 0

    def __len__(self) -> int:
        return ceil(len(self.dataset) / (self.run.batch_size * self.num_processes))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; a dataset that augments its examples is told, too."""
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        width = self.run.batch_size * self.num_processes
        for start in range(0, len(order), width):
            together = order[start : start + width]
            missing = -len(together) % self.num_processes
            together += [Again(together[i % len(together)]) for i in range(missing)]
            share = len(together) // self.num_processes
            yield together[self.process * share : (self.process + 1) * share]

    def _order(self) -> list[int]:
        rng = random.Random(f"order-{self.run.seed}-{self.epoch}")
        order = list(range(len(self.dataset)))
        rng.shuffle(order)
        if not self.run.group_by_length:
            return order
        lengths: Sequence[int] = self.dataset.lengths  # type: ignore[attr-defined]
        step = self.run.batch_size * self.run.accumulation * self.num_processes
        window = LENGTH_WINDOW * step
        by_length = [
            index
            for start in range(0, len(order), window)
            for index in sorted(order[start : start + window], key=lambda i: lengths[i], reverse=True)
        ]
        whole = len(by_length) // step * step  # a smaller last step stays last, where the trainer expects it
        steps = [by_length[start : start + step] for start in range(0, whole, step)]
        rng.shuffle(steps)
        return [index for indices in steps for index in indices] + by_length[whole:]


class Dealt(Dataset[Any]):
    """A dataset whose examples have no loss where they are read :class:`Again`."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        """Example `index`."""
        example = self.dataset[index]
        return example.without_loss() if isinstance(index, Again) else example


class EpochLoader(DataLoader[Any]):
    """A loader over :class:`EpochBatches`, whose epoch the trainer sets."""

    def set_epoch(self, epoch: int) -> None:
        """See :meth:`EpochBatches.set_epoch`."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def make_loader(
    dataset: Dataset[Any],
    run: RunSettings,
    collate: Callable[[list[Any]], Any],
    *,
    num_workers: int = 0,
    process: int = 0,
    num_processes: int = 1,
    pin_memory: bool = False,
) -> EpochLoader:
    """This process's batches, collated. Draws no number from torch's generators, which belong to dropout."""
    batches: Any = EpochBatches(dataset, run, process=process, num_processes=num_processes)  # type: ignore[arg-type]
    return EpochLoader(
        Dealt(dataset),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(run.seed),
    )


def num_steps(num_examples: int, run: RunSettings, num_processes: int = 1) -> int:
    """Optimiser steps of a run over `num_examples`."""
    if run.max_steps is not None:
        return run.max_steps
    batches = ceil(num_examples / (run.batch_size * num_processes))
    return max(1, ceil(run.epochs * ceil(batches / run.accumulation)))
