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
    """What :class:`RecordingRollouts` wrote, by seed, read from the disk when it is asked for.

    The student that is trained did not write them: off-policy.

    Raises:
        ConfigError: the folder holds no rollouts. DataError: a file can't be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._places = {seed: (path, offset) for path, offset, seed, _ in _read(self.folder)}
        if not self._places:
            raise ConfigError(
                f"rollout.path: {folder} holds no rollouts ({PATTERN}); a run with rollout.record: true writes them"
            )

    def roll_out(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Rollout]:
        """See :class:`pipo.training.rollout.RolloutSource`.

        Raises:
            DataError: there is none of this prompt with this seed.
        """
        found = [self._look_up(seed) for seed in seeds]
        missing = [
            prompt
            for prompt, rollout in zip(prompts, found, strict=True)
            if rollout is None or rollout.prompt_ids != prompt
        ]
        if missing:
            raise DataError(
                f"{self.folder} has no rollout of {len(missing)} of the {len(prompts)} prompts of this step, such as the one that begins "
                f"{missing[0][:8]}: record them with the same data, run.seed, batch_size and accumulation"
            )
        return [rollout for rollout in found if rollout is not None]

    def _look_up(self, seed: int) -> Rollout | None:
        if seed not in self._places:
            return None
        path, offset = self._places[seed]
        with path.open("rb") as file:
            file.seek(offset)
            return _parse(json.loads(file.readline()))


def read_rollouts(folder: Path) -> Iterator[Rollout]:
    """The rollouts of a folder, step by step.

    Raises:
        DataError: a file can't be read.
    """
    return (rollout for *_, rollout in _read(folder))


def _read(folder: Path) -> Iterator[tuple[Path, int, int, Rollout]]:
    """Where each rollout of a folder is, its seed, and itself."""
    for path in sorted(folder.glob(PATTERN)):
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                    yield path, offset, row["seed"], _parse(row)
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f"{path}, line {number}, is no rollout: {error!r}") from error
                offset += len(line)


def _parse(row: dict[str, Any]) -> Rollout:
    pairs = [PairRecord(*pair) for pair in row["pairs"]]
    return Rollout(row["prompt_ids"], pairs, row["finish_reason"], row["threshold"])


def texts_of(folder: Path, pad_id: int = 0) -> Iterator[list[int]]:
    """What a teacher reads of each rollout in a folder, for :func:`pipo.training.served_teacher.write_teacher_files`."""
    for rollout in read_rollouts(folder):
        slots: Slots = slots_of_rollout(rollout, pad_id)
        yield teacher_tokens(slots)
