"""Runners: what a step does to the running samples. One kind per method; this is PIPO's, `baselines` has the others.

A runner owns the cache; row `i` of it is the `i`-th running sample.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

import torch

from pipo.engine.request import TokenLogprob
from pipo.engine.sequence import Sequence, StepTokens
from pipo.model.cache import RowCache, measure_bytes
from pipo.model.modeling import PipoForCausalLM
from pipo.model.sampling import SamplingBatch, TokenHistory
from pipo.model.sampling_batch import to_device
from pipo.model.step import HostPairs, Prefilled, Rows, fetch, prefill_pairs, read_pairs, write_pair
from pipo.pairing import draws_drafts, num_pairs, pair_slots_from_tokens, slots_from_pairs


class Runner(Protocol):
    """One decoding method over the running samples. Positions are pairs for PIPO, tokens for a regular model."""

    cache: RowCache

    def measure_bytes(self) -> tuple[int, int]:
        """Bytes of cache per row, and per position of a row."""

    def check(self, sequence: Sequence) -> None:
        """Raise `RequestError` for parameters that this method can't honour."""

    def num_positions(self, sequence: Sequence) -> int:
        """Cache entries that the sample's prompt and steps so far take."""

    def positions_per_step(self) -> int:
        """Most cache entries that one more step adds."""

    def prefill(self, sequences: Seq[Sequence]) -> list[StepTokens]:
        """Run prompts (and steps already done) and write each sample's next tokens; the samples become rows."""

    def decode(self, sequences: Seq[Sequence]) -> list[StepTokens]:
        """One step of all rows."""

    def remove(self, row: int) -> None:
        """Forget a row; the last row takes its place."""


class RowSampling:
    """The sampling state of the running rows, built anew when rows join or leave and carried along otherwise."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._of_rows: tuple[SamplingBatch, TokenHistory | None] | None = None

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

    def _build(self, sequences: Seq[Sequence]) -> tuple[SamplingBatch, TokenHistory | None]:
        batch = SamplingBatch.build(
            [s.params for s in sequences],
            [s.seed for s in sequences],
            self.vocab_size,
            self.device,
            [s.stop_ids for s in sequences],
        )
        if not batch.any_penalty:
            return batch, None
        return batch, TokenHistory(batch, [s.prompt_ids for s in sequences], [s.token_ids for s in sequences])

    def _rows(self, sequences: Seq[Sequence], batch: SamplingBatch, history: TokenHistory | None) -> Rows:
        counts = torch.tensor([[s.position for s in sequences], [len(s.token_ids) for s in sequences]])
        position_B, num_tokens_B = to_device(counts, self.device)
        records = tuple(i for i, s in enumerate(sequences) if s.params.record_pairs)
        return Rows(batch, history, position_B, None if batch.min_stops is None else num_tokens_B, records)


class PipoRunner:
    """Pairs in, pairs out."""

    def __init__(self, model: PipoForCausalLM) -> None:
        self.model = model
        self.cache = RowCache(model.config.text_config, model.device)
        self.sampling = RowSampling(model.config.vocab_size, model.device)

    def measure_bytes(self) -> tuple[int, int]:
        """Bytes of cache per row, and per pair of a row."""
        with torch.no_grad():
            prefilled = prefill_pairs(self.model, [[0, 0]])
            prefilled.run_mtp(torch.zeros(1, dtype=torch.long, device=self.model.device))
        return measure_bytes(prefilled.cache)

    def check(self, sequence: Sequence) -> None:
        """Every parameter is honoured."""

    def num_positions(self, sequence: Sequence) -> int:
        """Pairs of prompt and steps so far."""
        return num_pairs(len(sequence.prompt_ids)) + len(sequence.pairs)

    def positions_per_step(self) -> int:
        """One pair."""
        return 1

    def prefill(self, sequences: Seq[Sequence]) -> list[StepTokens]:
        """Prefill samples, all of different prompts or all of one; the first pair of each."""
        pad = self.model.config.pad_token_id
        shared = len(sequences) > 1 and all(s.prompt_ids == sequences[0].prompt_ids and not s.pairs for s in sequences)
        slots = [
            pair_slots_from_tokens(s.prompt_ids, pad) + slots_from_pairs(s.pairs, pad)
            for s in (sequences[:1] if shared else sequences)
        ]
        prefilled = prefill_pairs(self.model, slots)
        if shared:
            prefilled.share(len(sequences))
        rows = self.sampling.rows_of(sequences)
        drafting = any(_wants_drafts(s) for s in sequences)
        result = write_pair(self.model, prefilled.last_hidden_BH, rows, prefilled.run_mtp if drafting else None)
        self._adopt(prefilled)
        return steps_of(fetch(result), sequences)

    def _adopt(self, prefilled: Prefilled) -> None:
        self.cache.adopt(prefilled.cache, prefilled.lengths)
        self.sampling.invalidate()

    def decode(self, sequences: Seq[Sequence]) -> list[StepTokens]:
        """Read each row's last pair, write its next one."""
        pad = self.model.config.pad_token_id
        slots = [slots_from_pairs(s.pairs[-1:], pad) for s in sequences]
        slots_B2 = to_device(torch.tensor(slots, dtype=torch.long), self.model.device)
        hidden_BH, run_mtp = read_pairs(self.model, slots_B2, self.cache)
        drafting = any(_wants_drafts(s) for s in sequences)
        result = write_pair(self.model, hidden_BH, self.sampling.rows(sequences), run_mtp if drafting else None)
        self.cache.advance()
        return steps_of(fetch(result), sequences)

    def remove(self, row: int) -> None:
        """Forget a row."""
        self.cache.remove(row)
        self.sampling.invalidate()


def _wants_drafts(sequence: Sequence) -> bool:
    return draws_drafts(sequence.params.threshold) or sequence.params.record_pairs


def steps_of(pairs: HostPairs, sequences: Seq[Sequence], judged: bool = False) -> list[StepTokens]:
    """A fetched step, sample by sample. `judged`: drafts were verified, by whatever means."""
    return [_step_of(pairs, row, sequence, judged) for row, sequence in enumerate(sequences)]


def _step_of(pairs: HostPairs, row: int, sequence: Sequence, judged: bool) -> StepTokens:
    draft, committed = pairs.draft[row], pairs.committed[row]
    num_top = sequence.params.logprobs or 0

    def logprob(token: int | None, value: float | None, top: list[tuple[int, float]]) -> TokenLogprob | None:
        return None if token is None or value is None else TokenLogprob(token, value, tuple(top[:num_top]))

    # In a batch where others draft, a row that never commits has been drafted for too; it does not know.
    confidence = pairs.confidence[row] if _wants_drafts(sequence) else None
    return StepTokens(
        token1=pairs.token1[row],
        token2=draft if committed else None,
        draft=draft if _wants_drafts(sequence) else None,
        confidence=confidence,
        finite=pairs.finite[row],
        judged=judged or confidence is not None,
        committed=committed,
        logprob1=logprob(pairs.token1[row], pairs.logprob1[row], pairs.top1[row]),
        logprob2=logprob(draft, pairs.logprob2[row], pairs.top2[row]),
        draft_logprob=None if draft is None else pairs.logprob2[row],
    )
