"""Runners: what a step does to the running samples. One kind per method; this is PIPO's, `baselines` has the others.

A runner owns the cache; row `i` of it is the `i`-th running sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from pipo.engine.capture import Capture
from pipo.engine.graph import StepGraphs, is_capturable
from pipo.engine.prefix import PrefixCache
from pipo.engine.request import TokenLogprob
from pipo.engine.row_sampling import RowSampling
from pipo.engine.sequence import Sequence, StepTokens
from pipo.model.cache import RowCache
from pipo.model.draft_vocab import DraftIds, DraftVocab
from pipo.model.modeling import PipoForCausalLM
from pipo.model.prefill import Prefill
from pipo.model.row_state import States, measure_bytes, resume_prefill
from pipo.model.rows import Rows
from pipo.model.sampling_batch import to_device
from pipo.model.static_cache import StaticRowCache
from pipo.model.step import (
    HostPairs,
    PairResult,
    fetch,
    read_pairs,
    slots_of_result,
    write_pair,
)
from pipo.pairing import Pair, draws_drafts, slots_from_pairs, tokens_from_pairs


@dataclass(frozen=True)
class Launched:
    """A step that was started: the samples whose rows it ran, and what reads its result, waiting for it where it must."""

    sequences: tuple[Sequence, ...]
    read: Callable[[], list[StepTokens]]


class Runner(Protocol):
    """One decoding method over the running samples. Positions are pairs for PIPO, tokens for a regular model."""

    cache: RowCache
    sampling: RowSampling
    graphs: StepGraphs | None
    """Captured steps, where the device has them."""

    def measure_bytes(self) -> tuple[int, int]:
        """Bytes of cache per row, and per position of a row."""

    def check(self, sequence: Sequence) -> None:
        """Raise `RequestError` for parameters that this method can't honour."""

    def num_positions(self, sequence: Sequence) -> int:
        """Cache entries that the sample's prompt and steps so far take."""

    def positions_per_step(self) -> int:
        """Most cache entries that one more step adds."""

    def num_cached(self, sequence: Sequence) -> int:
        """Entries of them that a prefill takes over from a kept cache; it must then be done on its own."""

    def begin(self, sequences: Seq[Sequence]) -> Prefill:
        """Start to read the prompts (and steps already done) of samples, all of different prompts or all of one."""

    def join(self, sequences: Seq[Sequence], prefill: Prefill) -> list[StepTokens]:
        """Their prompts are read: write each sample's next tokens; the samples become rows."""

    def looks_ahead(self, sequences: Seq[Sequence]) -> bool:
        """Whether the step after the one that was launched last can be launched before that one's result is read."""

    def launch(self, sequences: Seq[Sequence]) -> Launched:
        """Start one step of all rows."""

    def remove(self, row: int, sequence: Sequence) -> None:
        """Free the sample's row; the last row takes its place."""

    def reset(self) -> None:
        """Free all rows, whatever state a step left them in."""


class StepRunner(ABC):
    """Decoding by a step that is one function of tensors on the device, and so can be captured. See `pipo.engine.graph`."""

    cache: RowCache
    num_new = 1
    """Cache entries that a step adds to every row."""
    verifies = False
    """Whether drafts are judged without a confidence."""

    def __init__(
        self, config: PreTrainedConfig, device: torch.device, draft_vocab: DraftVocab | None, capture: Capture | None
    ) -> None:
        """`capture`: how steps are made repeatable; `None`: they are run as they come."""
        self.sampling = RowSampling(int(config.vocab_size), device, draft_vocab)
        self.graphs: StepGraphs | None = None
        if capture is None:
            self.cache = RowCache(config, device)
        else:
            self.cache = static = StaticRowCache(config, device)
            self.graphs = StepGraphs(self, static, self.sampling, capture)

    @abstractmethod
    def read_ids(self, sequences: Seq[Sequence]) -> list[list[int]]:
        """The ids that the next step of each sample reads, `T` each."""

    @abstractmethod
    def run(self, ids_BT: Tensor, rows: Rows, drafting: bool) -> PairResult:
        """One step of all rows. `drafting`: whether any row's draft can matter."""

    @abstractmethod
    def next_ids(self, ids_BT: Tensor, result: PairResult) -> Tensor:
        """What the step after it reads, int64 `[B, T]`."""

    def looks_ahead(self, sequences: Seq[Sequence]) -> bool:
        """Where the step is captured, its input does not wait for the host."""
        return self.graphs is not None and all(map(is_capturable, sequences))

    def launch(self, sequences: Seq[Sequence]) -> Launched:
        """Start one step of all rows: replayed where it can be, else run and read at once."""
        rows = tuple(sequences)
        if self.graphs is not None and all(map(is_capturable, rows)):
            read = self.graphs.launch(rows, any(map(wants_drafts, rows)))
            return Launched(rows, lambda: steps_of(read(), rows))
        steps = self.decode(rows)
        return Launched(rows, lambda: steps)

    def decode(self, sequences: Seq[Sequence]) -> list[StepTokens]:
        """Run a step of all rows and read its result."""
        ids_BT = to_device(torch.tensor(self.read_ids(sequences), dtype=torch.long), self.cache.device)
        result = self.run(ids_BT, self.sampling.rows(sequences), any(map(wants_drafts, sequences)))
        steps = steps_of(fetch(result), sequences, self.verifies)
        self._advance(steps)
        if self.graphs is not None:
            self.graphs.forget_rows()
        return steps

    def _advance(self, steps: list[StepTokens]) -> None:
        self.cache.advance(self.num_new)

    def reset(self) -> None:
        """Free all rows; nothing of them is kept."""
        self.cache.clear()
        self._rows_joined()

    def _rows_joined(self) -> None:
        self.sampling.invalidate()
        if self.graphs is not None:
            self.graphs.forget_rows()

    def _drop(self, row: int) -> None:
        """Free a row; the last row takes its place."""
        if self.graphs is not None:
            self.graphs.rows_left(row)
        self.cache.remove(row)
        self.sampling.invalidate()


class PipoRunner(StepRunner):
    """Pairs in, pairs out."""

    def __init__(
        self,
        model: PipoForCausalLM,
        prefix_cache_bytes: int = 0,
        draft_ids: DraftIds | None = None,
        capture: Capture | None = None,
    ) -> None:
        """`draft_ids`: what drafts are drawn from, where that is not the whole vocabulary. `capture`: see :class:`StepRunner`.

        Raises:
            ConfigError: they are another model's.
        """
        vocab = None if draft_ids is None else DraftVocab(model, draft_ids, with_elsewhere=True)
        super().__init__(model.config.text_config, model.device, vocab, capture)
        self.model = model
        self.prefixes = PrefixCache(prefix_cache_bytes, self.cache.has_states) if prefix_cache_bytes else None

    def measure_bytes(self) -> tuple[int, int]:
        """Bytes of cache per row, and per pair of a row."""
        with torch.no_grad():
            prefilled = Prefill(self.model, [[0, 0]]).finish()
            prefilled.run_mtp(torch.zeros(1, dtype=torch.long, device=self.model.device))
        return measure_bytes(prefilled.cache)

    def check(self, sequence: Sequence) -> None:
        """Every parameter is honoured."""

    def num_positions(self, sequence: Sequence) -> int:
        """Pairs of prompt and steps so far."""
        return len(sequence.prompt_pairs) + len(sequence.pairs)

    def positions_per_step(self) -> int:
        """One pair."""
        return 1

    def num_cached(self, sequence: Sequence) -> int:
        """Pairs at the start of the sample's prompt that are in the prefix cache."""
        match = None if self.prefixes is None else self.prefixes.find(_pairs(sequence))[0]
        return 0 if match is None else match.length

    def begin(self, sequences: Seq[Sequence]) -> Prefill:
        """Start to read prompts; a single one after the longest prefix that is cached."""
        distinct = distinct_prompts(sequences)
        prompts = [slots_from_pairs(_pairs(s), self.model.config.pad_token_id) for s in distinct]
        drafts = any(wants_drafts(s) for s in sequences)
        if self.prefixes is None or len(distinct) > 1:
            return Prefill(self.model, prompts, num_samples=len(sequences) // len(distinct), drafts=drafts)
        # States are kept where other prompts branch off.
        match, branch = self.prefixes.find(_pairs(distinct[0]))
        self.prefixes.count(hit=match is not None)
        cache, done = None, 0
        if match is not None:
            done = match.length
            states = match.entry.snapshots.get(done, match.entry.state.states)
            cache = resume_prefill(self.model.config.text_config, match.entry.state, done, states)
        return Prefill(
            self.model,
            prompts,
            cache=cache,
            num_cached=done,
            num_samples=len(sequences),
            drafts=drafts,
            keep_at=branch,
        )

    def join(self, sequences: Seq[Sequence], prefill: Prefill) -> list[StepTokens]:
        """The first pair of each sample."""
        prefilled = prefill.finish()
        shared = len(sequences) > len(prefilled.lengths)
        if shared:
            prefilled.share(len(sequences))
        rows = self.sampling.rows_of(sequences)
        result = write_pair(self.model, prefilled.last_hidden_BH, rows, prefilled.run_mtp if prefill.drafts else None)
        first_row = self.cache.num_rows
        self.cache.adopt(prefilled.cache, prefilled.lengths)
        self._rows_joined()
        steps = steps_of(fetch(result), sequences)
        snapshots = {} if prefill.keep_at is None or prefill.kept is None else {prefill.keep_at: prefill.kept}
        for row, (sequence, step) in enumerate(zip(sequences, steps, strict=True), first_row):
            if not sequence.pairs:  # the prefill after a preemption finds the sample's own cache
                sequence.num_cached_tokens = len(tokens_from_pairs(_pairs(sequence)[: prefill.num_cached]))
            if step.finite and (not shared or row == first_row):
                self._store(row, sequence, _pairs(sequence), step.token1, snapshots)
        return steps

    def _store(
        self, row: int, sequence: Sequence, pairs: list[Pair], next_token1: int, snapshots: dict[int, States]
    ) -> None:
        """Keep a row's cache of `pairs`, unless the MTP block has not seen them all."""
        if self.prefixes is not None and wants_drafts(sequence):
            self.prefixes.store(pairs, next_token1, self.cache.extract(row, len(pairs)), snapshots)

    def looks_ahead(self, sequences: Seq[Sequence]) -> bool:
        """Not where linear-attention states are to be kept: a row that ended would be one step past what it has written."""
        return super().looks_ahead(sequences) and not (self.cache.has_states and self.prefixes is not None)

    def read_ids(self, sequences: Seq[Sequence]) -> list[list[int]]:
        """Each row's last pair, as slots."""
        return [slots_from_pairs(s.pairs[-1:], self.model.config.pad_token_id) for s in sequences]

    def run(self, ids_BT: Tensor, rows: Rows, drafting: bool) -> PairResult:
        """Read each row's last pair, write its next one."""
        hidden_BH, run_mtp = read_pairs(self.model, ids_BT, self.cache)
        return write_pair(self.model, hidden_BH, rows, run_mtp if drafting else None)

    def next_ids(self, ids_BT: Tensor, result: PairResult) -> Tensor:
        """The pair that was written."""
        return slots_of_result(result, int(self.model.config.pad_token_id))

    def remove(self, row: int, sequence: Sequence) -> None:
        """Free a row; the prefix cache keeps what it held."""
        if sequence.pairs and sequence.finish_reason != "error":
            self._store(row, sequence, _pairs(sequence)[:-1], sequence.pairs[-1].token1, {})
        self._drop(row)


def _pairs(sequence: Sequence) -> list[Pair]:
    """What a prefill reads: the prompt, and what a preempted sample has written."""
    return [*sequence.prompt_pairs, *sequence.pairs]


def distinct_prompts(sequences: Seq[Sequence]) -> Seq[Sequence]:
    """One sample for each thing to read: all of them, or the first where they share a prompt."""
    return sequences[:1] if len({s.reading_key for s in sequences}) == 1 else sequences


def wants_drafts(sequence: Sequence) -> bool:
    """Whether any draft of this sample can matter."""
    return draws_drafts(sequence.params.tau) or sequence.params.record_pairs


def steps_of(pairs: HostPairs, sequences: Seq[Sequence], judged: bool = False) -> list[StepTokens]:
    """A fetched step, sample by sample. `judged`: drafts were verified, by whatever means."""
    return [_step_of(pairs, row, sequence, judged) for row, sequence in enumerate(sequences)]


def _step_of(pairs: HostPairs, row: int, sequence: Sequence, judged: bool) -> StepTokens:
    draft, committed = pairs.draft[row], pairs.committed[row]
    num_top = sequence.params.logprobs or 0

    def logprob(token: int | None, value: float | None, top: list[tuple[int, float]]) -> TokenLogprob | None:
        return None if token is None or value is None else TokenLogprob(token, value, tuple(top[:num_top]))

    # In a batch where others draft, a row that never commits has been drafted for too; it does not know.
    confidence = pairs.confidence[row] if wants_drafts(sequence) else None
    return StepTokens(
        token1=pairs.token1[row],
        token2=draft if committed else None,
        draft=draft if wants_drafts(sequence) else None,
        confidence=confidence,
        finite=pairs.finite[row],
        judged=judged or confidence is not None,
        committed=committed,
        logprob1=logprob(pairs.token1[row], pairs.logprob1[row], pairs.top1[row]),
        logprob2=logprob(draft, pairs.logprob2[row], pairs.top2[row]),
        draft_logprob=None if draft is None else pairs.logprob2[row],
        drawn_logprobs=(pairs.drawn1[row], None if draft is None else pairs.drawn2[row]),
    )
