"""Rollouts on disk: written while a run makes them, to be read by people, or by a run that has neither engine nor teacher at hand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from pipo.errors import ConfigError, DataError
from pipo.pairing import Slots, teacher_tokens
from pipo.training.rollout import PairRecord, Rollout, RolloutSource, slots_of_rollout

PATTERN = "step-*.jsonl"


class RecordingRollouts:
    """Rollouts of another source, each call's written to a file of its own.

    Args:
        folder: of the files. step: the optimiser step that is being made. process: this one's number.
        text_of: what people read of a rollout.
    """

    def __init__(
        self,
        source: RolloutSource,
        folder: Path,
        step: Callable[[], int],
        process: int = 0,
        text_of: Callable[[Rollout], str] | None = None,
    ) -> None:
        self.source = source
        self.folder = folder
        self.step = step
        self.process = process
        self.text_of = text_of

    def roll_out(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Rollout]:
        """See :class:`pipo.training.rollout.RolloutSource`. A step that is made again replaces its file."""
        found = self.source.roll_out(prompts, seeds)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{self.step():08d}-{self.process}.jsonl"
        partial = path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            for rollout, seed in zip(found, seeds, strict=True):
                file.write(json.dumps(self._row(rollout, seed)) + "\n")
        os.replace(partial, path)
        return found

    def _row(self, rollout: Rollout, seed: int) -> dict[str, Any]:
        return {
            "seed": seed,
            "threshold": rollout.threshold,
            "finish_reason": rollout.finish_reason,
            "text": None if self.text_of is None else self.text_of(rollout),
            "prompt_ids": rollout.prompt_ids,
            "pairs": [astuple(pair) for pair in rollout.pairs],
        }


class RecordedRollouts:
    """What :class:`RecordingRollouts` wrote, by prompt and seed. The student that is trained did not write them: off-policy.

    Raises:
        ConfigError: the folder holds no rollouts. DataError: a file can't be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._found = {(tuple(r.prompt_ids), seed): r for r, seed in read_rollouts(self.folder)}
        if not self._found:
            raise ConfigError(
                f"rollout.path: {folder} holds no rollouts ({PATTERN}); a run with rollout.record: true writes them"
            )

    def roll_out(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Rollout]:
        """See :class:`pipo.training.rollout.RolloutSource`.

        Raises:
            DataError: there is none of this prompt with this seed.
        """
        keys = [(tuple(prompt), seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        missing = [key for key in keys if key not in self._found]
        if missing:
            prompt, seed = missing[0]
            raise DataError(
                f"{self.folder} has no rollout of {len(missing)} prompts of this step, such as the one of {len(prompt)} tokens with seed "
                f"{seed}: record them with the same data, run.seed, batch_size and accumulation"
            )
        return [self._found[key] for key in keys]


def read_rollouts(folder: Path) -> Iterator[tuple[Rollout, int]]:
    """The rollouts of a folder, each with its seed.

    Raises:
        DataError: a file can't be read.
    """
    for path in sorted(folder.glob(PATTERN)):
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                    pairs = [PairRecord(*pair) for pair in row["pairs"]]
                    yield Rollout(row["prompt_ids"], pairs, row["finish_reason"], row["threshold"]), row["seed"]
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f"{path}, line {number}, is no rollout: {error!r}") from error


def texts_of(folder: Path, pad_id: int = 0) -> Iterator[list[int]]:
    """What a teacher reads of each rollout in a folder, for :func:`pipo.training.served_teacher.write_teacher_files`."""
    for rollout, _ in read_rollouts(folder):
        slots: Slots = slots_of_rollout(rollout, pad_id)
        yield teacher_tokens(slots)
