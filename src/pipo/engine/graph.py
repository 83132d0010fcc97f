"""The whole step as one captured CUDA graph, and its result read one step late.

A step's input (each row's last ids, its length, its place in its random sequence) lies in tensors that the step itself moves on.
So the host can start step t+1 before it has seen what step t wrote: it only says that rows have joined or left. A graph is
captured for each number of rows and capacity off a ladder (`pipo.model.static_cache`) and for each kind of sampling, when it is
first needed, and replayed from then on. Rows beyond those in use are computed and thrown away.

Steps that need the host in their midst, or tensors whose shapes follow the requests, are not captured: :func:`is_capturable`.

Shape legend: B rows of a graph, R all rows, T ids that a step reads per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from pipo.engine.capture import Capture, Step
from pipo.engine.row_sampling import RowSampling
from pipo.engine.sequence import Sequence
from pipo.errors import UnsupportedModelError
from pipo.model.row_attention import attend_by_rows
from pipo.model.rows import DraftPart, Rows
from pipo.model.sampling import SamplingBatch
from pipo.model.sampling_batch import to_device
from pipo.model.static_cache import StaticRowCache, on_ladder
from pipo.model.step import HostPairs, PairResult, pack, unpack

MAX_GRAPHS = 128
"""Graphs kept at most; the one captured first goes first."""
NUM_COLUMNS = 5
"""Of a packed result without log-probabilities."""

Batches = tuple[SamplingBatch, ...]
"""The rows' parameters, and where there is a draft vocabulary the same for its places."""


class StepProgram(Protocol):
    """One method's step as a function of tensors on the device. A step adds `num_new` entries to every row."""

    num_new: int

    def read_ids(self, sequences: Seq[Sequence]) -> list[list[int]]:
        """The ids that the next step of each sample reads, `T` each."""

    def run(self, ids_BT: Tensor, rows: Rows, drafting: bool) -> PairResult:
        """One step of all rows. `drafting`: whether any row's draft can matter."""

    def next_ids(self, ids_BT: Tensor, result: PairResult) -> Tensor:
        """What the step after it reads, int64 `[B, T]`."""


def is_capturable(sequence: Sequence) -> bool:
    """Whether a sample's step is the same work whatever it has written, and needs nothing from the host."""
    p = sequence.params
    follows_text = sequence.constraint is not None or p.min_tokens > 0
    keeps_history = p.presence_penalty != 0 or p.frequency_penalty != 0 or p.repetition_penalty != 1
    tells_more = p.logprobs is not None or p.record_pairs
    return not (follows_text or keeps_history or tells_more or p.logit_bias)


@dataclass
class _Graph:
    """A captured step: its own copy of the sampling tensors, and what replays it."""

    batches: Batches
    replay: Step
    loaded: Batches | None = None
    """Whose values `batches` have now."""


class StepGraphs:
    """Captured steps of one method on one cache.

    Args:
        capture: how a step is made repeatable: see `pipo.engine.capture`.
    """

    def __init__(self, program: StepProgram, cache: StaticRowCache, sampling: RowSampling, capture: Capture) -> None:
        self.program = program
        self.cache = cache
        self.sampling = sampling
        self.capture = capture
        self._graphs: dict[Any, _Graph] = {}
        self._version = -1
        self._rows: _RowTensors | None = None
        self._batches: Batches | None = None
        self._current = False

    # --- what the host tells

    def rows_left(self, row: int) -> None:
        """The cache is about to drop `row`; the last row takes its place."""
        self._batches = None
        if self._rows is not None and self._current:
            self._rows.move(self.cache.num_rows - 1, row)

    def forget_rows(self) -> None:
        """Rows joined, or were stepped by others: what the device knows of them is old."""
        self._batches, self._current = None, False

    def forget_weights(self) -> None:
        """The model has changed: drop what was captured, which holds its gate's numbers and the places of its weights."""
        self._graphs.clear()

    # --- a step

    def launch(self, sequences: Seq[Sequence], drafting: bool) -> Callable[[], HostPairs]:
        """Start a step of all rows; what is returned waits for its result."""
        with torch.cuda.device(self.cache.device if self.cache.device.type == "cuda" else -1):
            return self._launch(sequences, drafting)

    def _launch(self, sequences: Seq[Sequence], drafting: bool) -> Callable[[], HostPairs]:
        num_rows = len(sequences)
        self.cache.make_room(self.program.num_new)
        if not self._current or self._rows is None:
            self._load(sequences)
        rows = self._rows
        assert rows is not None
        if self._batches is None:
            self._batches = self._lay(sequences)
            rows.num_rows.fill_(num_rows)
        graph = self._graph(rows, self._batches, drafting)
        if graph.loaded is not self._batches:
            _copy(self._batches, graph.batches)
            graph.loaded = self._batches
        graph.replay()
        self.cache.advance(self.program.num_new)
        return _read_later(rows.table[:, :num_rows])

    def _load(self, sequences: Seq[Sequence]) -> None:
        """Tell the device where every row stands."""
        ids = self.program.read_ids(sequences)
        if self._rows is None:
            self._rows = _RowTensors.build(self.cache.limits[0], len(ids[0]), self.cache.device)
        self._rows.load(ids, [s.position for s in sequences])
        self.cache.load_lengths()
        self._current = True

    def _lay(self, sequences: Seq[Sequence]) -> Batches:
        """The rows' parameters, with the last row's for rows that are not in use, so that they ask for no other work."""
        num_rows = self.cache.rounded(len(sequences), 1)[0]
        batch, _, part = self.sampling.lay([*sequences, *[sequences[-1]] * (num_rows - len(sequences))])
        return tuple(map(_of_few_kinds, (batch,) if part is None else (batch, part.batch)))

    def _graph(self, rows: _RowTensors, batches: Batches, drafting: bool) -> _Graph:
        if self._version != self.cache.version:  # what was captured on buffers that are gone
            self._graphs.clear()
            self._version = self.cache.version
        key = (self.cache.capacity[1], drafting, *map(_kind_of, batches))
        graph = self._graphs.get(key)
        if graph is None:
            if len(self._graphs) >= MAX_GRAPHS:
                self._graphs.pop(next(iter(self._graphs)))
            graph = self._graphs[key] = self._capture(rows, batches, drafting)
        return graph

    def _capture(self, rows: _RowTensors, batches: Batches, drafting: bool) -> _Graph:
        """Capture a step and compare its first replay with steps that are run as they are.

        Raises:
            UnsupportedModelError: it can't be captured, or its replay writes something else.
        """
        own = tuple(map(_clone, batches))

        def step() -> None:
            self._step(rows, own, drafting)

        def run_and_undo() -> Tensor:
            rows.table.fill_(torch.nan)
            step()
            undo()
            return rows.table.clone()

        with self._undone() as undo:
            expected = [run_and_undo() for _ in range(2)]
            try:
                replay = self.capture(step, undo)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise self._refusal(f"can't be captured in a CUDA graph ({error})") from error
            rows.table.fill_(torch.nan)
            replay()
            if not _agree(rows.table, expected):
                raise self._refusal("writes something else when it is replayed from a CUDA graph")
        return _Graph(own, replay)

    def _refusal(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"the step of a {self.cache.config.model_type!r} model {what}: decode without graphs (cuda_graphs=False, --no-cuda-graphs)"
        )

    def _step(self, rows: _RowTensors, batches: Batches, drafting: bool) -> None:
        """One step on the device, its next input included."""
        b, vocab = batches[0].num_rows, self.sampling.draft_vocab
        ids_BT, position_B = rows.ids_RT[:b], rows.position_R[:b]
        part = None if vocab is None else DraftPart(vocab, batches[1])
        known = Rows(batches[0], None, position_B, None, part=part, captured=True)
        with self.cache.on_device(b), attend_by_rows(self.cache.config):
            result = self.program.run(ids_BT, known, drafting)
        rows.table[:, :b] = pack(result)
        ids_BT.copy_(self.program.next_ids(ids_BT, result))
        in_use_B = (rows.number_R[:b] < rows.num_rows).long()
        position_B += in_use_B
        self.cache.length_R[:b] += self.program.num_new * in_use_B

    @contextmanager
    def _undone(self) -> Iterator[Step]:
        """What a step changes for good is put back at the end, and whenever the given function is called.

        Keys and values need nothing: the next step writes them again, at the same places.
        """
        assert self._rows is not None
        changed = [self._rows.ids_RT, self._rows.position_R, self.cache.length_R]
        kept = [tensor.clone() for tensor in changed]
        states = self.cache.snapshot() if self.cache.has_states else None

        def undo() -> None:
            for tensor, before in zip(changed, kept, strict=True):
                tensor.copy_(before)
            if states is not None:
                self.cache.restore(states)

        try:
            yield undo
        finally:
            undo()


@dataclass
class _RowTensors:
    """The rows' part of a step's input and result, at fixed addresses."""

    ids_RT: Tensor
    position_R: Tensor
    number_R: Tensor
    """0 … R−1."""
    num_rows: Tensor
    """int64, one number: rows in use."""
    table: Tensor
    """float64 `[columns, R]`: the packed result."""

    @staticmethod
    def build(max_rows: int, num_ids: int, device: torch.device) -> _RowTensors:
        """Room for `max_rows` rows."""
        numbers = torch.arange(max_rows, device=device)
        zeros = torch.zeros_like
        ids_RT = torch.zeros(max_rows, num_ids, dtype=torch.long, device=device)
        table = torch.zeros(NUM_COLUMNS, max_rows, dtype=torch.float64, device=device)
        return _RowTensors(ids_RT, zeros(numbers), numbers, zeros(numbers[:1]), table)

    def load(self, ids: list[list[int]], positions: list[int]) -> None:
        """Write where every row stands."""
        device, b = self.ids_RT.device, len(ids)
        self.ids_RT[:b] = to_device(torch.tensor(ids, dtype=torch.long), device)
        self.position_R[:b] = to_device(torch.tensor(positions, dtype=torch.long), device)

    def move(self, source: int, target: int) -> None:
        """Overwrite row `target` with row `source`."""
        self.ids_RT[target] = self.ids_RT[source]
        self.position_R[target] = self.position_R[source]


def _of_few_kinds(batch: SamplingBatch) -> SamplingBatch:
    """The same sampling by work of fewer kinds, so of fewer graphs: more candidates than top-k needs, nuclei looked for twice."""
    top_k = min(on_ladder(batch.max_top_k, 16), batch.vocab_size) if batch.max_top_k else 0
    rows = batch.nucleus_rows
    if rows is not None and len(rows) < batch.num_rows:
        size = min(on_ladder(len(rows), 1), batch.num_rows - 1)
        rows = torch.cat([rows, rows[:1].expand(size - len(rows))])
    # What is kept of the vocabulary on a CPU is looked at.
    return replace(batch, max_top_k=top_k, max_kept=0, nucleus_rows=rows)


def _tensors_of(batch: SamplingBatch) -> dict[str, Any]:
    return {f.name: getattr(batch, f.name) for f in fields(batch) if isinstance(getattr(batch, f.name), Tensor)}


def _clone(batch: SamplingBatch) -> SamplingBatch:
    return replace(batch, **{name: tensor.clone() for name, tensor in _tensors_of(batch).items()})


def _copy(sources: Batches, targets: Batches) -> None:
    for source, target in zip(sources, targets, strict=True):
        for name, tensor in _tensors_of(target).items():
            tensor.copy_(getattr(source, name))


def _kind_of(batch: SamplingBatch) -> tuple[Any, ...]:
    """What decides the work that a batch's sampling is: all but the tensors' values."""
    values = [getattr(batch, f.name) for f in fields(batch)]
    return tuple((v.shape, v.dtype) if isinstance(v, Tensor) else v for v in values)


def _agree(replayed: Tensor, expected: list[Tensor]) -> bool:
    """Whether a packed result tells what the steps before it did, wherever those agree: a benchmark may steer what is committed."""
    one, other = (table.nan_to_num(nan=-2.0) for table in expected)
    return torch.allclose(replayed.nan_to_num(nan=-2.0)[one == other], one[one == other], rtol=0, atol=1e-3)


def _read_later(table: Tensor) -> Callable[[], HostPairs]:
    """Start to copy a packed result to the host; what is returned waits for it."""
    if table.device.type != "cuda":
        copy = table.clone()
        return lambda: unpack(copy)
    pinned = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
    pinned.copy_(table, non_blocking=True)
    arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()

    def read() -> HostPairs:
        arrived.synchronize()
        return unpack(pinned)

    return read
