"""The engine: requests wait, join, decode together, leave. Continuous batching over a runner.

A request's life: 1. `add` checks it and puts its samples in the queue. 2. `step` admits waiting samples while memory and
`max_num_seqs` allow, and prefills them: each becomes a row and gets its first pair. 3. Every other `step` decodes all rows
once. 4. A sample that stops leaves at once, and its row is free for the next step. 5. When memory runs out, the youngest row
goes back to the front of the queue with what it has written; its later prefill continues it exactly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from pipo.engine.request import SampleError
from pipo.engine.runner import Runner
from pipo.engine.sequence import Sequence, StepText, StepTokens
from pipo.errors import ConfigError, ContextLengthError

MAX_PREFILL_POSITIONS = 8192
HEADROOM = 32
"""Positions that must be free for a sample to be admitted beside others, so that it is not preempted at once."""

Listener = Callable[[Sequence, StepText], None]


@dataclass(frozen=True)
class CacheBudget:
    """Memory for the cache: `total_bytes`, of which a row takes `row_bytes` and each of its positions `position_bytes`."""

    total_bytes: int
    row_bytes: int
    position_bytes: int

    def fits(self, rows: int, length: int) -> bool:
        """Whether `rows` rows of `length` positions fit."""
        return rows * (self.row_bytes + length * self.position_bytes) <= self.total_bytes

    def max_length(self) -> int:
        """Positions of the longest single row."""
        return max(0, (self.total_bytes - self.row_bytes) // max(1, self.position_bytes))


class Engine:
    """Runs samples on a runner, `max_num_seqs` at most at a time, within a memory budget.

    Args:
        max_model_len: positions (pairs for PIPO) a sample may hold; by default the model's, less what memory forbids.

    Raises:
        ConfigError: `max_num_seqs < 1`, or a `max_model_len` that the model or the memory does not have.
    """

    def __init__(
        self,
        runner: Runner,
        budget: CacheBudget,
        *,
        max_positions: int,
        max_num_seqs: int,
        max_model_len: int | None = None,
    ) -> None:
        if max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs must be at least 1, got {max_num_seqs}")
        room = min(max_positions, budget.max_length())
        if max_model_len is not None and not 2 <= max_model_len <= room:
            raise ConfigError(
                f"max_model_len must lie between 2 and {room} (the model has {max_positions} positions, the cache's "
                f"{budget.total_bytes} bytes hold {budget.max_length()}), got {max_model_len}"
            )
        if room < 2:
            raise ConfigError(f"the cache's {budget.total_bytes} bytes hold no request; give it more")
        self.runner = runner
        self.budget = budget
        self.max_model_len = max_model_len or room
        self.max_num_seqs = max_num_seqs
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._listeners: dict[int, Listener] = {}
        runner.cache.fits = budget.fits
        self.on_finish: Callable[[Sequence], None] | None = None
        """Called with every sample that has ended, before its listener."""

    def shrink(self, total_bytes: int) -> None:
        """Leave memory to others: hold the cache, and so the context, to less than before.

        Raises:
            ConfigError: no request would fit.
        """
        budget = replace(self.budget, total_bytes=min(total_bytes, self.budget.total_bytes))
        if budget.max_length() < 2:
            raise ConfigError(f"the cache's {total_bytes} bytes hold no request; give it more")
        self.budget, self.max_model_len = budget, min(self.max_model_len, budget.max_length())
        self.runner.cache.fits = budget.fits

    # --- requests

    def add(self, samples: Iterable[Sequence], listener: Listener | None = None) -> None:
        """Queue the samples of a request; `listener` is called after each of their steps.

        Raises:
            RequestError: a sample that can never be served. Then none of the request is queued.
        """
        samples = list(samples)
        self.check(samples)
        self.waiting.extend(samples)
        if listener is not None:
            self._listeners.update({id(sequence): listener for sequence in samples})

    def check(self, samples: Iterable[Sequence]) -> None:
        """Raise `RequestError` for a sample that can never be served. Any thread may call this."""
        for sequence in samples:
            self.runner.check(sequence)
            needed = self.runner.num_positions(sequence) + self.runner.positions_per_step()
            if needed > self.max_model_len:
                raise ContextLengthError(
                    # Clients look for these first words; some know the error by nothing else.
                    f"this model's maximum context length is {self.max_model_len} positions; the prompt of {len(sequence.prompt_ids)} "
                    f"tokens and one step take {needed}, which leaves no room to generate"
                )

    def abort(self, request_id: int) -> None:
        """End a request's samples where they are; their rows are free at once."""
        for sequence in [s for s in self.waiting if s.request_id == request_id]:
            self.waiting.remove(sequence)
            self._abort(sequence)
        for row in reversed(range(len(self.running))):
            if self.running[row].request_id == request_id:
                sequence = self.running[row]
                self._leave(row)
                self._abort(sequence)

    @property
    def has_work(self) -> bool:
        """Whether any sample waits or runs."""
        return bool(self.waiting or self.running)

    # --- a step

    @torch.no_grad()
    def step(self) -> None:
        """Prefill what can be admitted, else decode every running sample once.

        A step that is cut off, by Ctrl-C or a failure, costs nobody a token: what it left half done is thrown away.
        """
        admitted = self._admit()
        try:
            if admitted:
                for group in self._prefill_groups(admitted):
                    first_row = len(self.running)
                    steps = self.runner.prefill(group)
                    self.running.extend(group)
                    self._take(first_row, steps)
                return
            self._make_room()
            if self.running:
                self._take(0, self.runner.decode(self.running))
        except BaseException:
            self._start_over(admitted)
            raise

    def _start_over(self, admitted: list[Sequence]) -> None:
        """Empty the cache and queue every sample again, ahead of those that wait: prefilled with what it has written."""
        self.runner.reset()
        known = {id(sequence) for sequence in [*self.running, *self.waiting]}
        again = self.running + [sequence for sequence in admitted if id(sequence) not in known]
        self.running = []
        self.waiting.extendleft(reversed([sequence for sequence in again if not sequence.finished]))

    def _admit(self) -> list[Sequence]:
        """Take samples off the queue, in order, while they fit beside the running ones."""
        admitted: list[Sequence] = []
        longest = max(map(self.runner.num_positions, self.running), default=0)
        while self.waiting and len(self.running) + len(admitted) < self.max_num_seqs:
            positions = self.runner.num_positions(self.waiting[0])
            rows = len(self.running) + len(admitted) + 1
            length = min(max(longest, positions) + HEADROOM, self.max_model_len)
            if rows > 1 and not self.budget.fits(rows, length):
                break
            longest = max(longest, positions)
            admitted.append(self.waiting.popleft())
        return admitted

    def _prefill_groups(self, admitted: list[Sequence]) -> list[list[Sequence]]:
        """Samples to prefill in one call: those of one prompt; else prompts of like length.

        Padding would change a linear-attention state, so there lengths must be equal.
        """
        by_prompt: dict[int, list[Sequence]] = {}
        for sequence in admitted:
            key = id(sequence) if sequence.pairs else id(sequence.prompt_pairs)
            by_prompt.setdefault(key, []).append(sequence)
        alone = [len(same) > 1 or self.runner.reuses(same[0]) for same in by_prompt.values()]
        groups = [same for same, on_its_own in zip(by_prompt.values(), alone, strict=True) if on_its_own]
        single = [same[0] for same, on_its_own in zip(by_prompt.values(), alone, strict=True) if not on_its_own]
        group: list[Sequence] = []
        for sequence in sorted(single, key=self.runner.num_positions):
            positions = self.runner.num_positions(sequence)
            if group:
                shortest = self.runner.num_positions(group[0])
                alike = positions == shortest if self.runner.cache.has_states else positions <= 1.5 * shortest + 16
                if not alike or positions * (len(group) + 1) > MAX_PREFILL_POSITIONS:
                    groups.append(group)
                    group = []
            group.append(sequence)
        return [*groups, group] if group else groups

    def _make_room(self) -> None:
        """Send the youngest rows back to the queue until one more step fits."""
        step = self.runner.positions_per_step()
        while len(self.running) > 1:
            longest = max(map(self.runner.num_positions, self.running))
            if self.budget.fits(len(self.running), min(longest + step, self.max_model_len)):
                return
            row = max(range(len(self.running)), key=lambda r: self.running[r].arrival_s)
            self.waiting.appendleft(self.running[row])
            self._leave(row)

    def _take(self, first_row: int, steps: list[StepTokens]) -> None:
        """Give each row from `first_row` on its step; samples that end leave."""
        told: list[tuple[Sequence, StepText]] = []
        for row in reversed(range(first_row, len(self.running))):
            sequence = self.running[row]
            step = steps[row - first_row]
            error = _error_of(sequence, step)
            if error is not None:
                text = StepText(sequence.end("error", error), len(sequence.token_ids), None)
                self._leave(row)  # after it has ended: the cache is a step ahead of its tokens, and must not be kept
                told.append((sequence, text))
                continue
            text = sequence.take(step)
            used = self.runner.num_positions(sequence)
            if sequence.finished or used + self.runner.positions_per_step() > self.max_model_len:
                text = replace(text, text=text.text + sequence.end("length"))
                self._leave(row)
            told.append((sequence, text))
        for sequence, text in reversed(told):
            self._tell(sequence, text)

    def _tell(self, sequence: Sequence, text: StepText) -> None:
        listener = self._listeners.get(id(sequence))
        if sequence.finished:
            self._listeners.pop(id(sequence), None)
            if self.on_finish is not None:
                self.on_finish(sequence)
        if listener is not None:
            listener(sequence, text)

    def _abort(self, sequence: Sequence) -> None:
        before = len(sequence.token_ids)
        self._tell(sequence, StepText(sequence.end("abort"), before, None))

    def _leave(self, row: int) -> None:
        """Free a row; the last row takes its place, here as in the cache."""
        self.runner.remove(row, self.running[row])
        last = self.running.pop()
        if row < len(self.running):
            self.running[row] = last


def _error_of(sequence: Sequence, step: StepTokens) -> SampleError | None:
    """What makes this step the sample's last, if anything does."""
    if not step.finite:
        return "not_finite"
    return "grammar" if sequence.constraint is not None and sequence.constraint.failed else None
