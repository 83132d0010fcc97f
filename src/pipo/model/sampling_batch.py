"""What sampling needs to know about a batch: every row's parameters as tensors, and the tokens it has used.

Shapes: B rows of the batch, P rows of it that use penalties, V vocabulary, N entries (a row and a token id each).

Whatever decides which work is done (`any_penalty`, `max_top_k`, …) is known on the host when the batch is built, so
that a step asks the device nothing. Rows join and leave by building anew.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pipo.pairing import draws_drafts


class SamplingSettings(Protocol):
    """The fields of a request's parameters that sampling reads; `pipo.SamplingParams` has them."""

    @property
    def temperature(self) -> float: ...
    @property
    def greedy(self) -> bool: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def min_p(self) -> float: ...
    @property
    def presence_penalty(self) -> float: ...
    @property
    def frequency_penalty(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def min_tokens(self) -> int: ...
    @property
    def logprobs(self) -> int | None: ...
    @property
    def logit_bias(self) -> Mapping[int, float] | None: ...
    @property
    def tau(self) -> float: ...


@dataclass(frozen=True)
class Entries:
    """Single logits to change: entry n is row `rows_N[n]`, token `ids_N[n]`. No (row, token) occurs twice."""

    rows_N: Tensor
    ids_N: Tensor
    values_N: Tensor


@dataclass(frozen=True)
class SamplingBatch:
    """Per-row tensors on the device and, beside them, host-side facts about which work the batch needs at all.

    A greedy row has its temperature at 1 and its filters off, so that only the draw itself treats it specially.
    """

    device: torch.device
    vocab_size: int
    num_rows: int

    temperature_B: Tensor
    top_p_B: Tensor
    min_p_B: Tensor
    presence_B: Tensor
    frequency_B: Tensor
    repetition_B: Tensor
    threshold_B: Tensor
    """τ of the gate."""
    key_B: Tensor
    """int64, a hash of each row's seed: what its draws are made from."""
    top_k_B: Tensor
    """int64 in 1 … V; V is off."""
    greedy_B: Tensor
    """bool."""

    penalised: tuple[int, ...]
    """The P rows that use penalties."""
    penalised_P: Tensor
    nucleus_rows: Tensor | None
    """Rows with top-p but without top-k: only these look for their nucleus in the whole vocabulary."""
    biases: Entries | None
    min_stops: Entries | None
    """Stop ids of the rows that use min-tokens; each value is the row's min-tokens."""

    all_greedy: bool
    any_greedy: bool
    any_min_p: bool
    any_top_p_with_top_k: bool
    max_top_k: int
    """Largest top-k in use, 0 where none is."""
    max_kept: int
    """Where every row has a top-k or is greedy, and not all are: the largest top-k in use. Else 0."""
    any_repetition: bool
    """Whether a row uses the repetition penalty."""
    max_logprobs: int | None
    """Most alternatives that a row asks for; `None` where no row asks for log-probabilities."""
    any_drafts: bool
    """Whether any row's gate can commit a draft; where none can, MTP need not run."""

    @property
    def any_penalty(self) -> bool:
        """Whether a row uses penalties."""
        return bool(self.penalised)

    @classmethod
    def build(
        cls,
        params: Sequence[SamplingSettings],
        seeds: Sequence[int],
        vocab_size: int,
        device: torch.device | str,
        stop_ids: Sequence[Collection[int]] | None = None,
        place_of: Mapping[int, int] | None = None,
    ) -> SamplingBatch:
        """Lay out one row per request.

        Args:
            params: the parameters of each row.
            seeds: the seed of each row, any integer (its low 64 bits count).
            vocab_size: V of the logits.
            device: where the logits will be.
            stop_ids: per row the ids that min-tokens suppresses: the request's, and the model's unless ignored.
                Needed where a row uses min-tokens.
            place_of: of each token id among the V logits, where they are of a part of the vocabulary; by default the id.
        """
        device = torch.device(device)
        top_k = [p.top_k if 0 < p.top_k < vocab_size and not p.greedy else vocab_size for p in params]
        top_p = [1.0 if p.greedy else p.top_p for p in params]
        min_p = [0.0 if p.greedy else p.min_p for p in params]
        penalised = tuple(i for i, p in enumerate(params) if _uses_penalties(p))
        with_nucleus = [i for i, (p, k) in enumerate(zip(top_p, top_k, strict=True)) if p < 1 and k == vocab_size]
        max_top_k = max((k for k in top_k if k < vocab_size), default=0)
        bounded = all(p.greedy or k < vocab_size for p, k in zip(params, top_k, strict=True))
        biases = [(i, token, bias) for i, p in enumerate(params) for token, bias in (p.logit_bias or {}).items()]
        integers = [[splitmix64(seed) for seed in seeds], top_k, [int(p.greedy) for p in params]]
        key_B, top_k_B, greedy_B = to_device(torch.tensor(integers, dtype=torch.int64), device).unbind()
        temperature = [1.0 if p.greedy else p.temperature for p in params]
        return cls(
            **_float_rows(params, [temperature, top_p, min_p], device),
            device=device,
            vocab_size=vocab_size,
            num_rows=len(params),
            key_B=key_B,
            top_k_B=top_k_B,
            greedy_B=greedy_B.bool(),
            penalised=penalised,
            penalised_P=_indices(penalised, device),
            nucleus_rows=_indices(with_nucleus, device) if with_nucleus else None,
            biases=_entries(_at_places(biases, place_of), torch.float32, device),
            min_stops=_entries(_at_places(_min_stops(params, stop_ids), place_of), torch.int64, device),
            all_greedy=all(p.greedy for p in params),
            any_greedy=any(p.greedy for p in params),
            any_min_p=any(value > 0 for value in min_p),
            any_top_p_with_top_k=any(p < 1 and k < vocab_size for p, k in zip(top_p, top_k, strict=True)),
            max_top_k=max_top_k,
            max_kept=max_top_k if bounded else 0,
            any_repetition=any(p.repetition_penalty != 1 for p in params),
            max_logprobs=max((p.logprobs for p in params if p.logprobs is not None), default=None),
            any_drafts=any(draws_drafts(p.tau) for p in params),
        )


class TokenHistory:
    """How often each token was generated and whether the prompt holds it, for the rows that use penalties.

    The filler of an empty second slot never enters; a sampled PAD id does, like any token.
    """

    def __init__(self, batch: SamplingBatch, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]):
        """Start from the token ids of every row of `batch`; rows without penalties are not looked at."""
        self.rows_P = batch.penalised_P
        shape = (len(batch.penalised), batch.vocab_size)
        self.counts_PV = torch.zeros(shape, dtype=torch.int32, device=batch.device)
        """Times each token was generated."""
        self.in_prompt_PV = torch.zeros(shape, dtype=torch.bool, device=batch.device)
        for p, row in enumerate(batch.penalised):
            prompt = _indices(prompts[row], batch.device)
            self.in_prompt_PV[p].index_fill_(0, prompt, True)
            output = _indices(outputs[row], batch.device)
            self.counts_PV[p].index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        self._frequency_P1 = batch.frequency_B[self.rows_P].unsqueeze(1)
        self._presence_P1 = batch.presence_B[self.rows_P].unsqueeze(1)
        self.penalty_PV = self._penalty(self.counts_PV)
        """What frequency and presence take off each logit."""

    def add(self, token_ids_B: Tensor, mask_B: Tensor | None = None, times: int = 1) -> None:
        """Count one token per row where `mask_B` is True (everywhere without it).

        `times=-1` takes it back: verification of a draft counts it only to see the next distribution.
        """
        token_ids_P1 = token_ids_B[self.rows_P].unsqueeze(1)
        amount_P1 = torch.full_like(token_ids_P1, times, dtype=torch.int32)
        if mask_B is not None:
            amount_P1 *= mask_B[self.rows_P].unsqueeze(1)
        self.counts_PV.scatter_add_(1, token_ids_P1, amount_P1)
        counts_P1 = self.counts_PV.gather(1, token_ids_P1)
        self.penalty_PV.scatter_(1, token_ids_P1, self._penalty(counts_P1))

    def _penalty(self, counts_PK: Tensor) -> Tensor:
        return self._frequency_P1 * counts_PK + self._presence_P1 * (counts_PK > 0)

    def within(self, ids_N: Tensor, num_more: int = 0) -> TokenHistory:
        """A copy for logits of a part of the vocabulary, in the order of `ids_N`, with `num_more` more of what never occurs."""
        part = copy.copy(self)
        part.counts_PV = F.pad(self.counts_PV[:, ids_N], (0, num_more))
        part.in_prompt_PV = F.pad(self.in_prompt_PV[:, ids_N], (0, num_more))
        part.penalty_PV = F.pad(self.penalty_PV[:, ids_N], (0, num_more))
        return part


def signed64(number: int) -> int:
    """The low 64 bits of an integer, read as a signed number."""
    return ((number + 2**63) & (2**64 - 1)) - 2**63


SPLITMIX64 = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""Increment and multipliers of SplitMix64 (Steele, Lea and Flood, 2014)."""


def splitmix64(number: int) -> int:
    """First output of SplitMix64 seeded with the low 64 bits of `number`, read as a signed number."""
    gamma, mix1, mix2 = SPLITMIX64
    mask = 2**64 - 1
    x = (number + gamma) & mask
    x = ((x ^ (x >> 30)) * mix1) & mask
    x = ((x ^ (x >> 27)) * mix2) & mask
    return signed64(x ^ (x >> 31))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a new host tensor to `device` without waiting for the copy."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _uses_penalties(params: SamplingSettings) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1


def _indices(values: Sequence[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor(values, dtype=torch.int64), device)


def _float_rows(
    params: Sequence[SamplingSettings], filters: list[list[float]], device: torch.device
) -> dict[str, Tensor]:
    rows = [
        *filters,
        [p.presence_penalty for p in params],
        [p.frequency_penalty for p in params],
        [p.repetition_penalty for p in params],
        [p.tau for p in params],
    ]
    names = ("temperature_B", "top_p_B", "min_p_B", "presence_B", "frequency_B", "repetition_B", "threshold_B")
    tensors = to_device(torch.tensor(rows, dtype=torch.float32), device).unbind()
    return dict(zip(names, tensors, strict=True))


def _min_stops(
    params: Sequence[SamplingSettings], stop_ids: Sequence[Collection[int]] | None
) -> list[tuple[int, int, float]]:
    if not any(p.min_tokens for p in params):
        return []
    assert stop_ids is not None, "min-tokens needs the stop ids of each row"
    rows = enumerate(zip(params, stop_ids, strict=True))
    return [(i, token, p.min_tokens) for i, (p, ids) in rows if p.min_tokens for token in sorted(set(ids))]


def _at_places(
    triples: list[tuple[int, int, float]], place_of: Mapping[int, int] | None
) -> list[tuple[int, int, float]]:
    if place_of is None:
        return triples
    return [(row, place_of[token], value) for row, token, value in triples if token in place_of]


def _entries(triples: Sequence[tuple[int, int, float]], dtype: torch.dtype, device: torch.device) -> Entries | None:
    if not triples:
        return None
    rows, ids, values = zip(*triples, strict=True)
    values_N = to_device(torch.tensor(values, dtype=dtype), device)
    return Entries(_indices(rows, device), _indices(ids, device), values_N)
