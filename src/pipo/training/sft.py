"""Supervised fine-tuning: conversations in slots, both heads' cross-entropy, and the gate. Section 3.1."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pipo.data.collate import collate_slots
from pipo.data.examples import SftDataset, build_sft_dataset
from pipo.training.config import SftConfig
from pipo.training.run import Setup, Summary, Task, Watch, run_training


def run_sft(config: SftConfig, *, resume: bool = False, watch: Watch | None = None) -> Summary:
    """Train; see :func:`pipo.training.run.run_training`."""

    def dataset(setup: Setup) -> SftDataset:
        data = config.data
        found = build_sft_dataset(
            data.train,
            setup.tokenizer,
            setup.pad_id,
            max_slots=data.max_slots,
            thinking_prefix=data.thinking_prefix,
            template_options=data.template_options,
            layout=data.layout,
            max_pad_ratio=data.max_pad_ratio,
            seed=config.run.seed,
            cache_dir=data.cache or setup.folder / "cache",
            num_examples=data.num_examples,
            split=data.split,
            subset=data.subset,
            note=setup.note,
        )
        for line in found.report.lines():
            setup.note(line)
        return found

    def collate(setup: Setup) -> Callable[[list[Any]], Any]:
        return partial(collate_slots, pad_id=setup.pad_id)

    return run_training(Task("sft", dataset, collate), config, resume=resume, watch=watch)
