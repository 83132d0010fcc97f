"""The engine: requests wait, join, decode together, leave. Continuous batching over a runner.

A request's life: 1. `add` checks it and puts its samples in the queue. 2. `step` admits waiting samples while memory and
`max_num_seqs` allow, and prefills them: each becomes a row and gets its first pair. A prompt of more than
`max_prefill_positions` takes several such steps. 3. Every other `step` decodes all rows once: after one that prefills comes
one that decodes. 4. A sample that stops leaves at once, and its row is free for the next step. 5. When memory runs out, the
youngest sample goes back to the front of the queue with what it has written; its later prefill continues it exactly.

A runner that looks ahead (`pipo.engine.graph`) is given step t+1 before step t's result is read, so that the device never waits
for the host. Rows join only when nothing is under way; a row that step t ended has been run once too often, and what that wrote
is thrown away.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from pipo.engine.prompts import LongPrompt, group_prompts
from pipo.engine.request import SampleError
from pipo.engine.runner import Launched, Runner
from pipo.engine.sequence import Sequence, StepText, StepTokens
from pipo.errors import ConfigError, ContextLengthError
from pipo.model.prefill import Prefill

MAX_PASSED = 64
"""Long prompts in the queue that shorter ones may pass while another one is read in chunks."""
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
        max_prefill_positions: positions that are read between two decoding steps at most.
        max_model_len: positions (pairs for PIPO) a sample may hold; by default the model's, less what memory forbids.

    Raises:
        ConfigError: `max_num_seqs < 1`, `max_prefill_positions < 1`, or a `max_model_len` that the model or the memory does not have.
    """

    def __init__(
        self,
        runner: Runner,
        budget: CacheBudget,
        *,
        max_positions: int,
        max_num_seqs: int,
        max_prefill_positions: int,
        max_model_len: int | None = None,
    ) -> None:
        if max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs must be at least 1, got {max_num_seqs}")
        if max_prefill_positions < 1:
            raise ConfigError(f"max_prefill_positions must be at least 1, got {max_prefill_positions}")
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
        self.max_prefill_positions = max_prefill_positions
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._joining: list[Sequence] = []  # what this step prefills
        self._long: LongPrompt | None = None
        self._decode_next = False
        self._under_way: Launched | None = None  # the step whose result is not read yet, where the runner looks ahead
        self._listeners: dict[int, Listener] = {}
        runner.cache.fits = self._fits
        runner.cache.limits = (max_num_seqs, self.max_model_len)
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
        self.runner.cache.limits = (self.max_num_seqs, self.max_model_len)

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
        if self._long is not None and self._long.sequences[0].request_id == request_id:
            for sequence in self._drop_long():
                self._abort(sequence)
        for row in reversed(range(len(self.running))):
            if self.running[row].request_id == request_id:
                sequence = self.running[row]
                self._leave(row)
                self._abort(sequence)

    @property
    def has_work(self) -> bool:
        """Whether any sample waits, is read, or runs."""
        return bool(self.waiting or self.reading or self.running)

    @property
    def reading(self) -> list[Sequence]:
        """The samples of the long prompt that is read in chunks, where there is one."""
        long = self._long  # asked for by other threads, too
        return [] if long is None else long.sequences

    # --- a step

    @torch.no_grad()
    def step(self) -> None:
        """Prefill what can be admitted, or decode every running sample once; by turns where there is both to do.

        A step that is cut off, by Ctrl-C or a failure, costs nobody a token: what it left half done is thrown away.
        """
        try:
            if not (self._decode_next and self.running):
                self._decode_next = True
                left = self._admit()
                if self._joining or self.reading:
                    return self._prefill(left)
            self._decode_next = False
            self._make_room()
            if self.running:
                self._decode()
        except BaseException:
            self._start_over()
            raise

    def _decode(self) -> None:
        """Take a step of all rows; where the runner looks ahead, with the next one under way."""
        launched = self._under_way or self.runner.launch(self.running)
        self._under_way = None
        if self._looks_ahead():
            self._under_way = self.runner.launch(self.running)
        self._take_launched(launched)

    def _looks_ahead(self) -> bool:
        """Whether to start the step after the one under way. Where every row is sure to end, nobody would read it."""
        if all(len(sequence.token_ids) + 1 >= sequence.max_tokens for sequence in self.running):
            return False
        return self.runner.looks_ahead(self.running)

    def _settle(self) -> None:
        """Take the step that is under way, if one is: then the host knows all that the rows have written."""
        launched, self._under_way = self._under_way, None
        if launched is not None:
            self._take_launched(launched)

    def _take_launched(self, launched: Launched) -> None:
        """Give the rows of a step that still run what it wrote for them."""
        steps = {id(s): step for s, step in zip(launched.sequences, launched.read(), strict=True)}
        self._take(0, [steps[id(sequence)] for sequence in self.running])

    def _start_over(self) -> None:
        """Empty the cache and queue every sample again, ahead of those that wait: prefilled with what it has written."""
        self.runner.reset()
        self._under_way = None
        left = {id(s): s for s in [*self.running, *self.reading, *self._joining, *self.waiting] if not s.finished}
        self.running, self._long, self._joining = [], None, []
        self.waiting = deque(left.values())

    # --- prompts

    def _admit(self) -> int:
        """Take samples off the queue, in order, while they fit beside the others; how many positions are left to this step.

        A prompt that a step can't read whole becomes the long one. While there is one, half of each step's positions are for
        prompts that fit in there; others wait, and are passed.
        """
        used = passed = 0
        rows = len(self.running) + len(self.reading)
        longest = max(map(self.runner.num_positions, [*self.running, *self.reading]), default=0)
        keys: set[int] = set()
        while len(self.waiting) > passed < MAX_PASSED:
            sequence = self.waiting[passed]
            limit = self.max_prefill_positions // (1 if self._long is None else 2)
            positions = new = self.runner.num_positions(sequence)
            if rows and not self._fits_beside(rows, max(longest, positions), positions):
                break
            if new > limit:
                new -= self.runner.num_cached(sequence)
            if sequence.reading_key in keys:
                new = 0
            if self._long is not None and self._long.takes(sequence):
                self._long.sequences.append(sequence)
            elif new > limit and self._long is not None:
                passed += 1
                continue
            elif new > limit and not self._joining:
                self._long = LongPrompt([sequence])
            elif used + new > limit:
                break
            else:
                used += new
                keys.add(sequence.reading_key)
                self._joining.append(sequence)
            del self.waiting[passed]
            rows, longest = rows + 1, max(longest, positions)
        return self.max_prefill_positions - used

    def _fits_beside(self, rows: int, longest: int, positions: int) -> bool:
        """Whether one more sample, whose prompt takes `positions`, fits beside `rows` others, with room to go on for a while."""
        chunks = positions // self.max_prefill_positions
        length = longest + HEADROOM + chunks * self.runner.positions_per_step()
        return rows < self.max_num_seqs and self._holds(rows + 1, min(length, self.max_model_len))

    def _prefill(self, left: int) -> None:
        """Read the prompts that were admitted, and so many positions of the long one."""
        for group in group_prompts(self.runner, self._joining, self.max_prefill_positions):
            self._join(group, self.runner.begin(group))
        self._joining = []
        if self._long is not None:
            prefill = self._long.prefill = self._long.prefill or self.runner.begin(self._long.sequences)
            prefill.advance(left)
            if prefill.left == 0:
                self._joining = self.reading
                self._long = None
                self._join(self._joining, prefill)
                self._joining = []

    def _join(self, sequences: list[Sequence], prefill: Prefill) -> None:
        self._settle()
        first_row = len(self.running)
        steps = self.runner.join(sequences, prefill)
        self.running.extend(sequences)
        self._take(first_row, steps)

    def _drop_long(self) -> list[Sequence]:
        """Give up what was read of the long prompt; its samples."""
        sequences, self._long = self.reading, None
        return sequences

    # --- rows

    def _fits(self, rows: int, length: int) -> bool:
        """Whether so many rows fit beside the long prompt."""
        longest = max([length, *map(self.runner.num_positions, self.reading)])
        return self._holds(rows + len(self.reading), longest)

    def _holds(self, rows: int, length: int) -> bool:
        """Whether memory holds what the cache reserves for so many rows of this length."""
        return self.budget.fits(*self.runner.cache.rounded(rows, length))

    def _make_room(self) -> None:
        """Send the youngest samples back to the queue until one more step fits."""
        while self.running and len(self.running) + len(self.reading) > 1:
            steps = 1 + self._looks_ahead()
            longest = max(map(self.runner.num_positions, self.running)) + steps * self.runner.positions_per_step()
            if self._fits(len(self.running), min(longest, self.max_model_len)):
                return
            if self._under_way is not None:  # before a row goes, the host must know what it has written
                self._settle()
                continue
            row = max(range(len(self.running)), key=lambda r: self.running[r].arrival_s)
            if self._long is not None and self._long.arrival_s >= self.running[row].arrival_s:
                self.waiting.extendleft(reversed(self.reading))  # first, so that Ctrl-C amid both loses nobody
                self._drop_long()
            else:
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
