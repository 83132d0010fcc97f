"""Runners: what a step does to the running samples. One kind per method; this is PIPO's, `baselines` has the others.

A runner owns the cache; row `i` of it is the `i`-th running sample.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

import torch

from pipo.engine.prefix import PrefixCache
from pipo.engine.request import TokenLogprob
from pipo.engine.sequence import Sequence, StepTokens
from pipo.model.cache import RowCache
from pipo.model.draft_vocab import DraftIds, DraftVocab
from pipo.model.modeling import PipoForCausalLM
from pipo.model.prefill import Prefill
from pipo.model.row_state import States, measure_bytes, resume_prefill
from pipo.model.sampling import SamplingBatch, TokenHistory
from pipo.model.sampling_batch import to_device
from pipo.model.step import (
    DraftPart,
    HostPairs,
    Rows,
    fetch,
    read_pairs,
    write_pair,
)
from pipo.pairing import Pair, draws_drafts, slots_from_pairs, tokens_from_pairs


class Runner(Protocol):
    """One decoding method over the running samples. Positions are pairs for PIPO, tokens for a regular model."""

    cache: RowCache
    sampling: RowSampling

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

    def decode(self, sequences: Seq[Sequence]) -> list[StepTokens]:
        """One step of all rows."""

    def remove(self, row: int, sequence: Sequence) -> None:
        """Free the sample's row; the last row takes its place."""

    def reset(self) -> None:
        """Free all rows, whatever state a step left them in."""


Laid = tuple[SamplingBatch, TokenHistory | None, DraftPart | None]


class RowSampling:
    """The sampling state of the running rows, built anew when rows join or leave and carried along otherwise."""

    def __init__(self, vocab_size: int, device: torch.device, draft_vocab: DraftVocab | None = None) -> None:
        """`draft_vocab`: what drafts are drawn from, where that is not the whole vocabulary."""
        self.vocab_size = vocab_size
        self.device = device
        self.draft_vocab = draft_vocab
        self._of_rows: Laid | None = None

    def invalidate(self) -> None:
        """Rows joined or left."""
        self._of_rows = None

    def rows(self, sequences: Seq[Sequence]) -> Rows:
        """Sampling for a step of all running rows."""
        if self._of_rows is None:
            self._of_rows = self._build(sequences)
        return self._rows(sequences, *self._of_rows)

    def rows_of(self, sequences: Seq[Sequence]) -> Rows:
        """Sampling for a prefill, whose samples are not rows yet."""
        return self._rows(sequences, *self._build(sequences))

    def _build(self, sequences: Seq[Sequence]) -> Laid:
        params, seeds = [s.params for s in sequences], [s.seed for s in sequences]
        stop_ids = [s.stop_ids for s in sequences]
        batch = SamplingBatch.build(params, seeds, self.vocab_size, self.device, stop_ids)
        history, part = None, None
        if batch.any_penalty:
            history = TokenHistory(batch, [s.prompt_ids for s in sequences], [s.token_ids for s in sequences])
        if (vocab := self.draft_vocab) is not None:
            places = SamplingBatch.build(params, seeds, vocab.num_places, self.device, stop_ids, vocab.place_of)
            part = DraftPart(vocab, places)
        return batch, history, part

    def _rows(
        self, sequences: Seq[Sequence], batch: SamplingBatch, history: TokenHistory | None, part: DraftPart | None
    ) -> Rows:
        counts = torch.tensor([[s.position for s in sequences], [len(s.token_ids) for s in sequences]])
        position_B, num_tokens_B = to_device(counts, self.device)
        constraints = {i: s.constraint for i, s in enumerate(sequences) if s.constraint is not None}
        records = tuple(i for i, s in enumerate(sequences) if s.params.record_pairs)
        num_tokens = None if batch.min_stops is None else num_tokens_B
        return Rows(batch, history, position_B, num_tokens, constraints, records, part)


class PipoRunner:
    """Pairs in, pairs out."""

    def __init__(self, model: PipoForCausalLM, prefix_cache_bytes: int = 0, draft_ids: DraftIds | None = None) -> None:
        """`draft_ids`: what drafts are drawn from, where that is not the whole vocabulary.

        Raises:
            ConfigError: they are another model's.
        """
        self.model = model
        self.cache = RowCache(model.config.text_config, model.device)
        vocab = None if draft_ids is None else DraftVocab(model, draft_ids, with_elsewhere=True)
        self.sampling = RowSampling(model.config.vocab_size, model.device, vocab)
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
        self.sampling.invalidate()
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

    def decode(self, sequences: Seq[Sequence]) -> list[StepTokens]:
        """Read each row's last pair, write its next one."""
        pad = self.model.config.pad_token_id
        slots = [slots_from_pairs(s.pairs[-1:], pad) for s in sequences]
        slots_B2 = to_device(torch.tensor(slots, dtype=torch.long), self.model.device)
        hidden_BH, run_mtp = read_pairs(self.model, slots_B2, self.cache)
        drafting = any(wants_drafts(s) for s in sequences)
        result = write_pair(self.model, hidden_BH, self.sampling.rows(sequences), run_mtp if drafting else None)
        self.cache.advance()
        return steps_of(fetch(result), sequences)

    def reset(self) -> None:
        """Free all rows; nothing of them is kept."""
        self.cache.clear()
        self.sampling.invalidate()

    def remove(self, row: int, sequence: Sequence) -> None:
        """Free a row; the prefix cache keeps what it held."""
        if sequence.pairs and sequence.finish_reason != "error":
            self._store(row, sequence, _pairs(sequence)[:-1], sequence.pairs[-1].token1, {})
        self.cache.remove(row)
        self.sampling.invalidate()


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
