"""What sampling knows of the running rows: laid out once for as long as the same rows run."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from pipo.engine.sequence import Sequence
from pipo.model.draft_vocab import DraftVocab
from pipo.model.rows import DraftPart, Rows
from pipo.model.sampling import SamplingBatch, TokenHistory
from pipo.model.sampling_batch import to_device

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
            self._of_rows = self.lay(sequences)
        return self._rows(sequences, *self._of_rows)

    def rows_of(self, sequences: Seq[Sequence]) -> Rows:
        """Sampling for a prefill, whose samples are not rows yet."""
        return self._rows(sequences, *self.lay(sequences))

    def lay(self, sequences: Seq[Sequence]) -> Laid:
        """The samples' parameters as tensors, one row each; the history where a row uses penalties; the same for drafts of a part."""
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
