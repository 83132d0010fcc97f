"""One sample of one request while it runs, on the host: its tokens, its text, when it stops, what it counted."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field

from pipo.engine.constraint import Constraint
from pipo.engine.detokenize import Detokenizer
from pipo.engine.request import (
    FinishReason,
    PairRecord,
    RequestOutput,
    SampleError,
    SamplingParams,
    StreamEvent,
    TokenLogprob,
)
from pipo.pairing import Pair, TokenCounts


@dataclass(frozen=True, slots=True)
class StepTokens:
    """What one step wrote for one sample, before stops cut anything off.

    `finite`: the model's numbers were; else the tokens mean nothing. `judged`: a draft was judged, by the gate or by
    verification. `committed`: it was kept. `draft`: the draft, kept or not. `drawn_logprobs`: of token 1 and draft, under what
    each was drawn from.
    """

    token1: int
    token2: int | None = None
    draft: int | None = None
    confidence: float | None = None
    finite: bool = True
    judged: bool = False
    committed: bool = False
    logprob1: TokenLogprob | None = None
    logprob2: TokenLogprob | None = None
    draft_logprob: float | None = None
    drawn_logprobs: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True, slots=True)
class StepText:
    """What a step added to a sample: text, the tokens from index `before` on, the pair's record."""

    text: str
    before: int
    record: PairRecord | None


@dataclass
class Sequence:
    """A running sample. `pairs` is what its steps wrote; the next step reads the last one."""

    request_id: int
    index: int
    prompt_ids: list[int]
    prompt_pairs: list[Pair]
    """The prompt as PIPO reads it. Regular models read `prompt_ids`."""
    params: SamplingParams
    seed: int
    stop_ids: Collection[int]
    """Ids that end the text: the request's, and the model's own unless ignored."""
    max_tokens: int
    detokenizer: Detokenizer
    arrival_s: float
    prompt: str | None = None
    constraint: Constraint | None = None
    """Its place in the grammar it must follow."""
    token_ids: list[int] = field(default_factory=list)
    counts: TokenCounts = field(default_factory=TokenCounts)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    records: list[PairRecord] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    error: SampleError | None = None
    num_cached_tokens: int = 0
    """Prompt tokens whose cache was there already."""
    first_token_s: float | None = None
    num_first_tokens: int = 0
    last_token_s: float = 0.0

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None

    @property
    def reading_key(self) -> int:
        """The same for samples that have the same to read: one prompt, and nothing written after it yet."""
        return id(self) if self.pairs else id(self.prompt_pairs)

    @property
    def position(self) -> int:
        """Steps done so far."""
        return self.counts.num_pairs

    def take(self, step: StepTokens) -> StepText:
        """Append a step's tokens, cut at the first stop.

        Counting follows section 4: a draft cut off by a stop or by `max_tokens` is neither committed nor rejected.
        """
        now = time.perf_counter()
        before, text = len(self.token_ids), ""
        for token, logprob in ((step.token1, step.logprob1), (step.token2, step.logprob2)):
            if token is None or self.finished:
                break
            text += self._append(token, logprob)
        shown = len(self.token_ids) - before
        cut = self.finished and shown == 1
        committed = step.committed and not cut
        self.counts.add_pair(num_tokens=shown, judged=step.judged and not cut, committed=committed)
        self.pairs.append(Pair(step.token1, step.token2))
        if self.first_token_s is None:
            self.first_token_s, self.num_first_tokens = now, shown
        self.last_token_s = now
        record = None
        if self.params.record_pairs:
            lp1 = None if step.logprob1 is None else step.logprob1.logprob
            record = PairRecord(
                step.token1, step.draft, step.confidence, committed, lp1, step.draft_logprob, *step.drawn_logprobs
            )
            self.records.append(record)
        self.text += text
        if not self.finished and self.counts.num_pairs == self.params.max_pairs:
            self.finish_reason = "length"
        return StepText(text, before, record)

    def end(self, reason: FinishReason, error: SampleError | None = None) -> str:
        """Finish for a reason other than its own tokens, unless it has finished already; text still held back."""
        if self.finish_reason is None:
            self.finish_reason, self.error = reason, error
        text = self.detokenizer.finish()
        self.text += text
        return text

    def _append(self, token: int, logprob: TokenLogprob | None) -> str:
        self.token_ids.append(token)
        if self.params.logprobs is not None and logprob is not None:
            self.logprobs.append(logprob)
        if self.constraint is not None:
            self.constraint.accept(token)
        if token in self.stop_ids:
            self.finish_reason = "stop"
            return ""
        check = len(self.token_ids) > self.params.min_tokens
        text = self.detokenizer.push(token, check_stop=check)
        if self.detokenizer.stop_string is not None or (self.constraint is not None and self.constraint.complete):
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.max_tokens:
            self.finish_reason = "length"
        return text

    def event(self, step: StepText) -> StreamEvent:
        """What a step added, with the sample up to it."""
        return LiveEvent(self, step)

    def mark(self) -> Mark:
        """Where the sample is now."""
        return Mark(
            num_tokens=len(self.token_ids),
            num_characters=len(self.text),
            num_pairs=self.counts.num_pairs,
            num_committed=self.counts.num_committed,
            num_rejected=self.counts.num_rejected,
            last_token_s=self.last_token_s,
            finish_reason=self.finish_reason,
        )

    def output(self, mark: Mark | None = None) -> RequestOutput:
        """The sample so far, or as it was at `mark`: a copy that later steps leave alone."""
        mark = mark or self.mark()
        ttft_s = tpot_s = None
        if self.first_token_s is not None:
            ttft_s = self.first_token_s - self.arrival_s
            later = mark.num_tokens - self.num_first_tokens
            tpot_s = (mark.last_token_s - self.first_token_s) / later if later else None
        return RequestOutput(
            prompt_token_ids=self.prompt_ids,
            token_ids=self.token_ids[: mark.num_tokens],
            text=self.text[: mark.num_characters],
            finish_reason=mark.finish_reason,
            num_pairs=mark.num_pairs,
            num_committed=mark.num_committed,
            num_rejected=mark.num_rejected,
            num_cached_tokens=self.num_cached_tokens,
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            logprobs=self.logprobs[: mark.num_tokens] if self.params.logprobs is not None else None,
            pairs=self.records[: mark.num_pairs] if self.params.record_pairs else None,
            index=self.index,
            error=self.error if mark.finish_reason is not None else None,
            prompt=self.prompt,
        )


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a sample, which only ever grows: enough to say later what it was."""

    num_tokens: int
    num_characters: int
    num_pairs: int
    num_committed: int
    num_rejected: int
    last_token_s: float
    finish_reason: FinishReason | None


class LiveEvent(StreamEvent):
    """An event whose `output` is put together when it is read: copying the sample at every step would cost its square."""

    def __init__(self, sequence: Sequence, step: StepText) -> None:
        mark = sequence.mark()
        logprobs = tuple(sequence.logprobs[step.before :]) if sequence.params.logprobs is not None else None
        values = {
            "text": step.text,
            "token_ids": tuple(sequence.token_ids[step.before :]),
            "pair": step.record,
            "finish_reason": mark.finish_reason,
            "logprobs": logprobs,
            "time_s": mark.last_token_s - sequence.arrival_s if mark.num_pairs else None,
            "_sequence": sequence,
            "_mark": mark,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def output(self) -> RequestOutput:
        """The sample up to and with this step."""
        sequence: Sequence = self._sequence  # type: ignore[attr-defined]
        return sequence.output(self._mark)  # type: ignore[attr-defined]

    @property
    def index(self) -> int:
        """Which of the prompt's `n` samples this belongs to."""
        return int(self._sequence.index)  # type: ignore[attr-defined]
