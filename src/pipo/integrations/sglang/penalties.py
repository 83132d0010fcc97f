"""Penalties and `min_new_tokens` over every token that a request shows: token 1 is counted before token 2 is drawn, filler never is.

SGLang's own penalisers count one id a step, and under overlap scheduling one step late; they are put out of work here. What each setting
means is as SGLang has it for a regular model: all three penalties look at generated tokens alone, the prompt's count for nothing.

Counts live on the device and change in place right after each draw. A batch that is filtered or merged meanwhile waits for that on the
device, by an event, and not on the host.

Shape legend: R requests, V vocabulary, S stop ids of the request with most of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipo.integrations.sglang.hooks import Hook
from pipo.integrations.sglang.serving import served
from pipo.model.sampling_batch import to_device


@dataclass(frozen=True, slots=True)
class PenaltySettings:
    """One request's."""

    frequency: float = 0.0
    presence: float = 0.0
    repetition: float = 1.0
    min_new_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    """What may not be drawn before `min_new_tokens`; empty where that is 0."""

    @property
    def needs_counts(self) -> bool:
        """Whether it matters how often each token was written."""
        return self.frequency != 0 or self.presence != 0 or self.repetition != 1

    @classmethod
    def of(cls, req: Any) -> PenaltySettings:
        """Of an SGLang request."""
        params = req.sampling_params
        stops = _stop_ids(req) if params.min_new_tokens > 0 else set()
        penalties = params.frequency_penalty, params.presence_penalty, params.repetition_penalty
        return cls(*penalties, params.min_new_tokens if stops else 0, tuple(sorted(stops)))


def _stop_ids(req: Any) -> set[int]:
    """The request's, the model's and the tokenizer's."""
    found = set(req.sampling_params.stop_token_ids or ()) | set(req.eos_token_ids or ())
    if req.tokenizer is not None:
        found |= {req.tokenizer.eos_token_id, *(req.tokenizer.additional_stop_token_ids or ())}
    return {one for one in found if one is not None}


class Penalties:
    """Those of a batch. What nobody in it needs is `None` and costs nothing."""

    def __init__(
        self, settings: Sequence[PenaltySettings], tokens: Sequence[Sequence[int]], vocab_size: int, device: Any
    ) -> None:
        """`tokens`: what each request has written already."""
        self.device = torch.device(device)
        self.vocab_size = vocab_size
        self.settings = list(settings)
        self.counts_RV: Tensor | None = None
        """How often each token was written, int32."""
        self.num_tokens_R: Tensor | None = None
        """How many were written, int64."""
        self._updated = torch.get_device_module(self.device).Event() if self.device.type != "cpu" else None
        if self._needs_counts:
            self.counts_RV = self._no_counts()
            for row, written in enumerate(tokens):
                if settings[row].needs_counts and len(written):
                    ids = _int64(list(written), self.device)
                    self.counts_RV[row].index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        if self._needs_lengths:
            self.num_tokens_R = _int64([len(written) for written in tokens], self.device)
        self._lay_out()

    # --- a batch changes

    def filter(self, keep: Sequence[int], keep_R: Tensor) -> None:
        """Keep some requests; `keep_R` is the same on the device."""
        self._wait()
        self.settings = [self.settings[row] for row in keep]
        if self.counts_RV is not None:
            self.counts_RV = self.counts_RV[keep_R] if self._needs_counts else None
        if self.num_tokens_R is not None:
            self.num_tokens_R = self.num_tokens_R[keep_R] if self._needs_lengths else None
        self._lay_out()

    def merge(self, other: Penalties) -> None:
        """Add another batch's requests behind."""
        self._wait()
        other._wait()
        # A batch that kept nothing has requests that look at nothing: zeros do.
        if self.counts_RV is not None or other.counts_RV is not None:
            both = [one._no_counts() if one.counts_RV is None else one.counts_RV for one in (self, other)]
            self.counts_RV = torch.cat(both)
        if self.num_tokens_R is not None or other.num_tokens_R is not None:
            both = [one._no_lengths() if one.num_tokens_R is None else one.num_tokens_R for one in (self, other)]
            self.num_tokens_R = torch.cat(both)
        self.settings = self.settings + other.settings
        self._lay_out()

    # --- a step

    def apply_(self, logits_RV: Tensor) -> None:
        """Change logits in place, in SGLang's order: additive penalties, then repetition; early stops last."""
        if self.counts_RV is not None:
            seen_RV = self.counts_RV > 0
            logits_RV.sub_(self._frequency_R1 * self.counts_RV).sub_(self._presence_R1 * seen_RV)
            scale_RV = torch.where(seen_RV, self._repetition_R1, 1.0)
            logits_RV.copy_(torch.where(logits_RV < 0, logits_RV * scale_RV, logits_RV / scale_RV))
        if self.num_tokens_R is not None:
            too_early_R1 = (self.num_tokens_R < self._min_new_tokens_R).unsqueeze(1)
            stops_RS = logits_RV.gather(1, self._stops_RS).masked_fill(too_early_R1, -torch.inf)
            logits_RV.scatter_(1, self._stops_RS, stops_RS)

    def count(self, token_R: Tensor, where_R: Tensor | None = None) -> None:
        """Enter drawn tokens, in all rows or in those where `where_R` is True."""
        if self.counts_RV is None and self.num_tokens_R is None:
            return
        shown_R = torch.ones_like(token_R) if where_R is None else where_R.long()
        if self.counts_RV is not None:
            self.counts_RV.scatter_add_(1, token_R.unsqueeze(1), shown_R.unsqueeze(1).int())
        if self.num_tokens_R is not None:
            self.num_tokens_R.add_(shown_R)
        if self._updated is not None:
            self._updated.record()

    # --- inner

    @property
    def _needs_counts(self) -> bool:
        return any(one.needs_counts for one in self.settings)

    @property
    def _needs_lengths(self) -> bool:
        return any(one.stop_ids for one in self.settings)

    def _no_counts(self) -> Tensor:
        return torch.zeros(len(self.settings), self.vocab_size, dtype=torch.int32, device=self.device)

    def _no_lengths(self) -> Tensor:
        return torch.zeros(len(self.settings), dtype=torch.int64, device=self.device)

    def _wait(self) -> None:
        """Let the current stream wait for the last step's counts."""
        if self._updated is not None:
            self._updated.wait()

    def _lay_out(self) -> None:
        """Settings as tensors, new ones: a step in flight may still read the old."""
        rows = self.settings
        if self.counts_RV is not None:
            table = [[one.frequency for one in rows], [one.presence for one in rows], [one.repetition for one in rows]]
            columns = to_device(torch.tensor(table, dtype=torch.float32), self.device).unsqueeze(-1)
            self._frequency_R1, self._presence_R1, self._repetition_R1 = columns.unbind()
        if self.num_tokens_R is not None:
            most = max(len(one.stop_ids) for one in rows)
            # Shorter lists repeat an id; a row without any has `min_new_tokens` 0 and changes nothing.
            self._stops_RS = _int64([_padded(one.stop_ids or (0,), most) for one in rows], self.device)
            self._min_new_tokens_R = _int64([one.min_new_tokens for one in rows], self.device)


def _padded(ids: tuple[int, ...], length: int) -> list[int]:
    return [*ids, *ids[:1] * (length - len(ids))]


def _int64(values: Any, device: torch.device) -> Tensor:
    return to_device(torch.tensor(values, dtype=torch.int64), device)


def around_orchestrator(
    init: Callable[..., None], orchestrator: Any, vocab_size: int, batch: Any, penalizers: set[Any]
) -> None:
    """SGLang's penalisers stay away from pairs."""
    init(orchestrator, vocab_size, batch, penalizers if served() is None else set())


HOOKS = (
    Hook(
        "sampling.penaltylib.orchestrator.BatchedPenalizerOrchestrator.__init__",
        "around",
        around_orchestrator,
        ("self", "vocab_size", "batch", "penalizers"),
    ),
)
