"""Prompts to read: which of them in one call, and a long one in chunks."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from pipo.engine.runner import Runner
from pipo.engine.sequence import Sequence
from pipo.model.prefill import Prefill


def default_prefill_positions(device: torch.device) -> int:
    """Most positions that are read between two decoding steps, unless told otherwise: enough for the full matrix rate."""
    return 512 if device.type == "cpu" else 8192


@dataclass(eq=False)
class LongPrompt:
    """A prompt that is read in chunks, and the samples that share it. `prefill`: once it has begun."""

    sequences: list[Sequence]
    prefill: Prefill | None = None

    @property
    def arrival_s(self) -> float:
        """When its request came."""
        return self.sequences[0].arrival_s

    def takes(self, sequence: Sequence) -> bool:
        """Whether a sample can still share it."""
        return self.prefill is None and sequence.reading_key == self.sequences[0].reading_key


def group_prompts(runner: Runner, sequences: Seq[Sequence], max_positions: int) -> list[list[Sequence]]:
    """Samples to prefill in one call: those of one prompt; else prompts of like length, `max_positions` with their padding at most.

    Padding would change a linear-attention state, so there lengths must be equal.
    """
    by_prompt: dict[int, list[Sequence]] = {}
    for sequence in sequences:
        by_prompt.setdefault(sequence.reading_key, []).append(sequence)
    groups: list[list[Sequence]] = []
    single: list[Sequence] = []
    for same in by_prompt.values():
        if len(same) > 1 or runner.num_cached(same[0]):
            groups.append(same)
        else:
            single += same
    group: list[Sequence] = []
    for sequence in sorted(single, key=runner.num_positions):
        positions = runner.num_positions(sequence)
        if group:
            shortest = runner.num_positions(group[0])
            alike = positions == shortest if runner.cache.has_states else positions <= 1.5 * shortest + 16
            if not alike or positions * (len(group) + 1) > max_positions:
                groups.append(group)
                group = []
        group.append(sequence)
    return [*groups, group] if group else groups
