"""The baselines, on a regular checkpoint: regular decoding, MTP without verification, speculative decoding.

They share engine, cache and sampler with PIPO, so that a comparison shows the methods and nothing else. A position is a token.

Shape legend: B rows, T new tokens, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from pipo.engine.capture import Capture
from pipo.engine.runner import StepRunner, distinct_prompts, steps_of
from pipo.engine.sequence import Sequence, StepTokens
from pipo.errors import ConfigError, RequestError
from pipo.model.backbone import LayerCall
from pipo.model.base import BaseForCausalLM
from pipo.model.draft_vocab import NO_DRAFT, DraftIds, DraftVocab
from pipo.model.prefill import Prefill, Prefilled
from pipo.model.row_state import measure_bytes
from pipo.model.rows import Rows
from pipo.model.sampling import (
    BONUS,
    RESIDUAL,
    TOKEN2,
    VERIFY,
    Verdict,
    probabilities,
    process_logits,
    sample,
    speculative_verify,
    token_logprobs,
    uniform,
)
from pipo.model.step import (
    PairResult,
    fetch,
    finite_rows,
    single_tokens,
)


class BaseRunner(StepRunner):
    """What the baselines have in common. See :class:`pipo.engine.runner.Runner`."""

    name = "regular"
    drafts = False
    """Whether the method needs the model's MTP block."""

    def __init__(
        self, model: BaseForCausalLM, draft_ids: DraftIds | None = None, capture: Capture | None = None
    ) -> None:
        """`draft_ids`: what drafts are drawn from, where that is not the whole vocabulary. A method that drafts nothing needs none.

        Raises:
            ConfigError: the method needs an MTP block and the model has none, or the draft vocabulary is another model's.
        """
        if self.drafts and model.mtp is None:
            raise ConfigError(
                f"method={self.name!r} drafts with the model's MTP block, and this checkpoint has no mtp.* tensors"
            )
        # Verification tells what lies elsewhere, and a draft that is always kept must be a token.
        vocab = DraftVocab(model, draft_ids, with_elsewhere=False) if self.drafts and draft_ids is not None else None
        super().__init__(model.config, model.device, vocab, capture)
        self.model = model

    def measure_bytes(self) -> tuple[int, int]:
        """Bytes of cache per row, and per position of a row."""
        with torch.no_grad():
            prefilled = Prefill(self.model, [[0]]).finish()
            if self.drafts:
                prefilled.run_mtp(torch.zeros(1, dtype=torch.long, device=self.model.device))
        return measure_bytes(prefilled.cache)

    def check(self, sequence: Sequence) -> None:
        """Pair records exist only where pairs do."""
        if sequence.params.record_pairs:
            raise RequestError(f"record_pairs: the method {self.name!r} writes no pairs")
        if self.drafts and sequence.constraint is not None:
            raise RequestError(f"structured output is not supported by the method {self.name!r}")

    def num_positions(self, sequence: Sequence) -> int:
        """Tokens of prompt and output."""
        return len(sequence.prompt_ids) + len(sequence.token_ids)

    def positions_per_step(self) -> int:
        """Most tokens that one step adds."""
        return 2 if self.drafts else 1

    def num_cached(self, sequence: Sequence) -> int:
        """The baselines keep no prefixes."""
        return 0

    def remove(self, row: int, sequence: Sequence) -> None:
        """Free a row."""
        self._drop(row)

    def begin(self, sequences: Seq[Sequence]) -> Prefill:
        """Start to read prompts."""
        distinct = distinct_prompts(sequences)
        prompts = [s.prompt_ids + s.token_ids for s in distinct]
        return Prefill(self.model, prompts, num_samples=len(sequences) // len(distinct), drafts=self.drafts)

    def join(self, sequences: Seq[Sequence], prefill: Prefill) -> list[StepTokens]:
        """The first token of each sample (and what the method adds)."""
        prefilled = prefill.finish()
        if len(sequences) > len(prefilled.lengths):
            prefilled.share(len(sequences))
        rows = self.sampling.rows_of(sequences)
        result = self._after_prefill(prefilled, rows, self._write_token(prefilled.last_hidden_BH, rows))
        self.cache.adopt(prefilled.cache, prefilled.lengths)
        self._rows_joined()
        return steps_of(fetch(result), sequences)

    def _after_prefill(self, prefilled: Prefilled, rows: Rows, first: PairResult) -> PairResult:
        return first

    def _write_token(self, hidden_BH: Tensor, rows: Rows) -> PairResult:
        """Draw each row's next token."""
        hidden_BH, finite_B = finite_rows(hidden_BH)
        token1_B, logprobs1 = rows.draw(self.model.sampling_logits(hidden_BH))
        rows.count(token1_B)
        return single_tokens(token1_B, finite_B, logprobs1)

    def _read(self, ids_BT: Tensor) -> tuple[Tensor, LayerCall]:
        """Run the backbone over each row's next tokens: `h [B, T, H]`."""
        positions_BT = self.cache.begin(ids_BT.shape[1])
        inputs_BTH = self.model.embed(ids_BT)
        return self.model.run_backbone(inputs_BTH, positions_BT, self.cache.masks(inputs_BTH.dtype), self.cache)


class RegularRunner(BaseRunner):
    """One token per step."""

    def read_ids(self, sequences: Seq[Sequence]) -> list[list[int]]:
        """Each row's last token."""
        return [s.token_ids[-1:] for s in sequences]

    def run(self, ids_BT: Tensor, rows: Rows, drafting: bool) -> PairResult:
        """Read each row's last token, write the next."""
        hidden_B1H, _ = self._read(ids_BT)
        return self._write_token(hidden_B1H[:, 0], rows)

    def next_ids(self, ids_BT: Tensor, result: PairResult) -> Tensor:
        """The token that was written."""
        return result.token1_B[:, None]


class MtpRunner(BaseRunner):
    """Two tokens per step: the MTP block's draft is always kept, and the backbone reads both."""

    name = "mtp"
    drafts = True
    num_new = 2

    def _after_prefill(self, prefilled: Prefilled, rows: Rows, first: PairResult) -> PairResult:
        return self._with_draft(rows, first, prefilled.run_mtp(first.token1_B))

    def read_ids(self, sequences: Seq[Sequence]) -> list[list[int]]:
        """Each row's last two tokens."""
        return [s.token_ids[-2:] for s in sequences]

    def run(self, ids_BT: Tensor, rows: Rows, drafting: bool) -> PairResult:
        """Read each row's last two tokens, write the next two."""
        hidden_B2H, call = self._read(ids_BT)
        first = self._write_token(hidden_B2H[:, 1], rows)
        following_B2 = torch.stack([ids_BT[:, 1], first.token1_B], dim=1)
        mtp_hidden_BH = self.model.run_mtp(following_B2, hidden_B2H, call, self.cache)[:, 1]
        return self._with_draft(rows, first, mtp_hidden_BH)

    def next_ids(self, ids_BT: Tensor, result: PairResult) -> Tensor:
        """The two tokens that were written."""
        return torch.stack([result.token1_B, result.draft_B], dim=1)

    def _with_draft(self, rows: Rows, first: PairResult, mtp_hidden_BH: Tensor) -> PairResult:
        mtp_hidden_BH, _ = finite_rows(mtp_hidden_BH)
        drawn = rows.draw_draft(rows.draft_logits(self.model, mtp_hidden_BH), first.token1_B)
        rows.count(drawn.token_B)
        kept_B = torch.ones_like(drawn.token_B, dtype=torch.bool)
        return first._replace(draft_B=drawn.token_B, committed_B=kept_B, logprobs2=drawn.logprobs)


class SpeculativeRunner(BaseRunner):
    """The MTP block drafts one token, the backbone verifies it: lossless (Leviathan et al., 2023).

    A step reads the last token and the draft. Where the draft stands it writes the draft and one token more, else the token
    that replaces it. Keys and values of a rejected draft are overwritten by the next step. A linear-attention state can't be
    cropped: where a draft fails, the states from before the step are put back and the one good token is read again, which
    costs another backbone pass and a look at the device.
    """

    name = "speculative"
    drafts = True
    verifies = True

    def __init__(
        self, model: BaseForCausalLM, draft_ids: DraftIds | None = None, capture: Capture | None = None
    ) -> None:
        """`capture` is not used: how far a step goes on, and what it must read again, is known on the host only."""
        super().__init__(model, draft_ids)
        self.verify: Callable[..., Verdict] = speculative_verify
        """What judges drafts. A benchmark puts a given share of acceptance here."""
        self._forget_drafts()

    def _forget_drafts(self) -> None:
        device = self.model.device
        self._draft_B = torch.zeros(0, dtype=torch.long, device=device)
        self._draft_probabilities_BV = torch.zeros(0, int(self.model.config.vocab_size), device=device)

    def reset(self) -> None:
        """Free all rows and their pending drafts."""
        super().reset()
        self._forget_drafts()

    def remove(self, row: int, sequence: Sequence) -> None:
        """Free a row and its pending draft."""
        super().remove(row, sequence)
        for tensor in (self._draft_B, self._draft_probabilities_BV):
            tensor[row] = tensor[-1].clone()
        self._draft_B = self._draft_B[:-1]
        self._draft_probabilities_BV = self._draft_probabilities_BV[:-1]

    def _after_prefill(self, prefilled: Prefilled, rows: Rows, first: PairResult) -> PairResult:
        draft_B, draft_BV = self._propose(rows, prefilled.run_mtp(first.token1_B), 1)
        self._draft_B = torch.cat([self._draft_B, draft_B])
        self._draft_probabilities_BV = torch.cat([self._draft_probabilities_BV, draft_BV])
        return first

    def _propose(self, rows: Rows, mtp_hidden_BH: Tensor, num_new_B: Tensor | int) -> tuple[Tensor, Tensor]:
        """A draft per row and the distribution over the whole vocabulary that it was drawn from."""
        mtp_hidden_BH, _ = finite_rows(mtp_hidden_BH)
        logits_BV = rows.process_draft(rows.draft_logits(self.model, mtp_hidden_BH), num_new_B)
        draft_B = sample(logits_BV, rows.draft_batch, rows.position_B, TOKEN2)
        draft_BV = probabilities(logits_BV, rows.draft_batch)
        if rows.part is None:
            return draft_B, draft_BV
        vocab = rows.part.vocab
        return vocab.token_M[draft_B], vocab.spread(draft_BV, rows.batch.vocab_size)

    def read_ids(self, sequences: Seq[Sequence]) -> list[list[int]]:
        """Each row's last token; its draft is on the device."""
        return [s.token_ids[-1:] for s in sequences]

    def run(self, ids_BT: Tensor, rows: Rows, drafting: bool) -> PairResult:
        """Verify each row's draft, write one or two tokens, draft again."""
        ids_B2 = torch.stack([ids_BT[:, 0], self._draft_B], dim=1)
        before = self.cache.snapshot() if self.cache.has_states else None
        hidden_B2H, call = self._read(ids_B2)
        result, accepted_B = self._verify(rows, hidden_B2H)
        following_B2 = torch.stack([result.token1_B, result.draft_B.clamp_min(0)], dim=1)
        mtp_hidden_B2H = self.model.run_mtp(following_B2, hidden_B2H, call, self.cache)
        mtp_hidden_BH = torch.where(accepted_B[:, None], mtp_hidden_B2H[:, 1], mtp_hidden_B2H[:, 0])
        self._draft_B, self._draft_probabilities_BV = self._propose(rows, mtp_hidden_BH, 1 + accepted_B.long())
        if before is not None and not bool(accepted_B.all()):
            after = self.cache.snapshot()
            self.cache.restore(before)
            self._read(ids_B2[:, :1])
            self.cache.restore(after, accepted_B)
        return result

    def next_ids(self, ids_BT: Tensor, result: PairResult) -> Tensor:
        """The last token that was written."""
        return torch.where(result.committed_B, result.draft_B, result.token1_B)[:, None]

    def _advance(self, steps: list[StepTokens]) -> None:
        self.cache.advance([1 + step.committed for step in steps])

    def _verify(self, rows: Rows, hidden_B2H: Tensor) -> tuple[PairResult, Tensor]:
        """Token 1 is the draft or its replacement; where the draft stands, token 2 is the backbone's next."""
        flat, finite = finite_rows(hidden_B2H.flatten(0, 1))
        logits_B2V, finite_B = (
            self.model.sampling_logits(flat).view(len(self._draft_B), 2, -1),
            finite.view(-1, 2).all(-1),
        )
        batch, position_B = rows.batch, rows.position_B
        target_BV = process_logits(logits_B2V[:, 0], batch, rows.history, rows.num_tokens_B)
        verdict = self.verify(
            probabilities(target_BV, batch),
            self._draft_probabilities_BV,
            self._draft_B,
            uniform(batch.key_B, position_B, VERIFY),
            uniform(batch.key_B, position_B, RESIDUAL),
        )
        accepted_B = verdict.accepted_B
        token1_B = torch.where(accepted_B, self._draft_B, verdict.replacement_B)
        rows.count(token1_B)
        next_num_B = None if rows.num_tokens_B is None else rows.num_tokens_B + 1
        bonus_BV = process_logits(logits_B2V[:, 1], batch, rows.history, next_num_B)
        bonus_B = sample(bonus_BV, batch, position_B, BONUS)
        rows.count(bonus_B, accepted_B)
        num = rows.num_logprobs
        first, second = (
            None if num is None else token_logprobs(logits_B2V[:, slot], token_B, num)
            for slot, token_B in ((0, token1_B), (1, bonus_B))
        )
        token2_B = bonus_B.masked_fill(~accepted_B, NO_DRAFT)
        nan_B = torch.full(token1_B.shape, torch.nan, device=token1_B.device)
        return PairResult(token1_B, token2_B, nan_B, accepted_B, finite_B, first, second), accepted_B
