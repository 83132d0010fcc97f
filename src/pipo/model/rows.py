"""What sampling knows about the rows of a step, and how their tokens are drawn from logits.

Nothing here waits for the device but grammars, which follow token 1 on the host.

Shape legend: B rows, H width, V vocabulary (or, of drafts, the places of a draft vocabulary).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pipo.model.draft_vocab import DraftVocab
from pipo.model.drafter import Drafter
from pipo.model.sampling import (
    TOKEN1,
    TOKEN2,
    Kept,
    SamplingBatch,
    TokenHistory,
    TokenLogprobs,
    drawn_logprobs,
    kept_logits,
    process_logits,
    sample,
    token_logprobs,
)


class TokenConstraint(Protocol):
    """A grammar's say on what a row may write: bool `[V]` on the host."""

    def allowed(self) -> Tensor: ...

    def allowed_after(self, token: int) -> Tensor: ...


class DraftPart(NamedTuple):
    """A draft vocabulary, and the rows' parameters laid out for its places."""

    vocab: DraftVocab
    batch: SamplingBatch


class DrawnDraft(NamedTuple):
    """Token 2 of every row, as it was drawn. Logits are over the places of the draft vocabulary, where there is one."""

    token_B: Tensor
    """int64; `NO_DRAFT` where the draw fell outside the draft vocabulary."""
    place_B: Tensor
    """int64: where the drawn logit stands."""
    logprobs: TokenLogprobs | None


@dataclass
class Rows:
    """What sampling knows about the rows of a step."""

    batch: SamplingBatch
    history: TokenHistory | None
    """Tokens used so far; updated by the step. `None` where no row has penalties."""
    position_B: Tensor
    """int64: each row's number of steps before this one. With the row's seed it decides the draw."""
    num_tokens_B: Tensor | None
    """int64: visible tokens before this step; needed where a row uses min-tokens."""
    constraints: Mapping[int, TokenConstraint] = field(default_factory=dict)
    """Rows whose next tokens a grammar limits. Following it for token 2 takes a look at token 1, so one more wait."""
    records: tuple[int, ...] = ()
    """Rows that asked for their pair records: their draft is always drawn."""
    part: DraftPart | None = None
    """What drafts are drawn from; `None`: the whole vocabulary."""
    captured: bool = False
    """Whether the step is captured to be replayed: then nothing may depend on what the host sees of it."""

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to return; `None` where nobody asks for log-probabilities."""
        wanted = self.batch.max_logprobs
        return 0 if wanted is None and self.records else wanted

    def draw(self, logits_BV: Tensor) -> tuple[Tensor, TokenLogprobs | None]:
        """Token 1 of every row, and its log-probabilities under the raw logits where somebody asks."""
        limited_BV = self._limit(logits_BV, [c.allowed() for c in self.constraints.values()])
        kept = kept_logits(limited_BV, self.batch, self.history, self.num_tokens_B)
        return self._draw(logits_BV, kept, TOKEN1)

    def draft_logits(self, model: Drafter, mtp_hidden_BH: Tensor) -> Tensor:
        """`[B, H] → [B, V]`, or over the places of the draft vocabulary: the second head."""
        return model.sampling_logits(mtp_hidden_BH) if self.part is None else self.part.vocab.logits(mtp_hidden_BH)

    def draw_draft(self, logits_BV: Tensor, token1_B: Tensor) -> DrawnDraft:
        """Token 2 after token 1, from :meth:`draft_logits`. Log-probabilities are under these logits, too."""
        kept = kept_logits(*self._draft_input(logits_BV, 1, token1_B))
        place_B, logprobs = self._draw(logits_BV, kept, TOKEN2)
        if self.part is None:
            return DrawnDraft(place_B, place_B, logprobs)
        token_M = self.part.vocab.token_M
        if logprobs is not None:
            logprobs = logprobs._replace(top_ids_BK=token_M[logprobs.top_ids_BK])
        return DrawnDraft(token_M[place_B], place_B, logprobs)

    @property
    def draft_batch(self) -> SamplingBatch:
        """The rows' parameters, laid out for :meth:`draft_logits`."""
        return self.batch if self.part is None else self.part.batch

    def process_draft(self, logits_BV: Tensor, num_new_B: Tensor | int) -> Tensor:
        """The logits that a draft is drawn from, where no grammar limits it. `num_new_B`: tokens that this step writes before it."""
        return process_logits(*self._draft_input(logits_BV, num_new_B, None))

    def _draft_input(
        self, logits_BV: Tensor, num_new_B: Tensor | int, token1_B: Tensor | None
    ) -> tuple[Tensor, SamplingBatch, TokenHistory | None, Tensor | None]:
        """What is processed for a draft after token 1, which only grammars look at."""
        history, vocab = self.history, None if self.part is None else self.part.vocab
        if history is not None and vocab is not None:
            history = history.within(vocab.ids_N, int(vocab.has_elsewhere))
        if self.constraints:
            assert token1_B is not None
            tokens = token1_B.tolist()
            allowed = [c.allowed_after(tokens[row]) for row, c in self.constraints.items()]
            logits_BV = self._limit(logits_BV, allowed if vocab is None else [vocab.allowed(one) for one in allowed])
        num_tokens_B = None if self.num_tokens_B is None else self.num_tokens_B + num_new_B
        return logits_BV, self.draft_batch, history, num_tokens_B

    def _draw(self, logits_BV: Tensor, kept: Kept, slot: int) -> tuple[Tensor, TokenLogprobs | None]:
        batch = self.draft_batch if slot == TOKEN2 else self.batch
        column_B = sample(kept.logits_BK, batch, self.position_B, slot)
        drawn_B = kept.token(column_B)
        num = self.num_logprobs
        if num is None:
            return drawn_B, None
        num_named = self.part.vocab.size if self.part is not None and slot == TOKEN2 else None
        found = token_logprobs(logits_BV, drawn_B, num, num_named)
        if self.records:
            found = found._replace(drawn_B=drawn_logprobs(kept.logits_BK, batch, column_B))
        return drawn_B, found

    def _limit(self, logits_BV: Tensor, allowed: Sequence[Tensor]) -> Tensor:
        """Take away what the rows' grammars forbid; `allowed`: in the order of `constraints`."""
        if not allowed:
            return logits_BV
        rows = list(self.constraints)
        forbidden = ~torch.stack(list(allowed)).to(logits_BV.device)
        limited_BV = logits_BV.clone()
        limited_BV[rows] = limited_BV[rows].masked_fill(forbidden, -torch.inf)
        return limited_BV

    def count(self, token_B: Tensor, mask_B: Tensor | None = None) -> None:
        """Enter drawn tokens into the history."""
        if self.history is not None:
            self.history.add(token_B, mask_B)
