"""From logits to tokens: penalties, filters, the draw, log-probabilities, and lossless verification of drafts.

Shapes: B rows of the batch, P rows of it that use penalties, V vocabulary, K most likely tokens.

Nothing here waits for the device. A draw is a pure function of the row's logits, seed and position, so a seeded
request gets the same tokens alone, in any batch, and on any device that gives the same logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipo.model.sampling_batch import (
    SPLITMIX64,
    SamplingBatch,
    SamplingSettings,
    TokenHistory,
    signed64,
    splitmix64,
)

__all__ = [
    "BONUS",
    "RESIDUAL",
    "TOKEN1",
    "TOKEN2",
    "VERIFY",
    "SamplingBatch",
    "SamplingSettings",
    "TokenHistory",
    "TokenLogprobs",
    "Verdict",
    "derive_seed",
    "drawn_logprobs",
    "probabilities",
    "process_logits",
    "sample",
    "speculative_verify",
    "token_logprobs",
    "uniform",
]

# What the uniform of a row and position is for; each use has its own.
TOKEN1, TOKEN2, VERIFY, RESIDUAL, BONUS = range(5)

_RESOLUTION = 2.0**50
"""Probabilities are drawn in units of 2⁻⁵⁰: sums of such are exact in float64, in any order, on any device."""


# --- logits -> the logits to draw from ----------------------------------------------------------------


def process_logits(
    logits_BV: Tensor,
    batch: SamplingBatch,
    history: TokenHistory | None = None,
    num_tokens_B: Tensor | None = None,
) -> Tensor:
    """Apply the parameters in vLLM's order: repetition, frequency and presence penalty, logit bias, min-tokens,
    temperature, top-k, top-p, min-p.

    Each filter is a cut: what lies at or above it stays, so tokens that tie at the cut all stay and the result does
    not depend on the order of a sort.

    Args:
        logits_BV: the model's logits, any float type; not changed.
        history: needed where a row uses penalties.
        num_tokens_B: visible tokens so far, the ones before this one; needed where a row uses min-tokens.

    Returns:
        float32 `[B, V]`, −inf where a token is excluded. Rows that sample have their largest logit at 0.
    """
    logits_BV = _adjusted(logits_BV.float(), batch, history, num_tokens_B)
    if batch.all_greedy:
        return logits_BV
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / batch.temperature_B.unsqueeze(1)
    cut_B = _filter_cut(logits_BV, batch)
    return logits_BV if cut_B is None else logits_BV.masked_fill(logits_BV < cut_B.unsqueeze(1), -torch.inf)


def _adjusted(
    logits_BV: Tensor, batch: SamplingBatch, history: TokenHistory | None, num_tokens_B: Tensor | None
) -> Tensor:
    """The logits with penalties, biases and suppressed stop ids, before temperature."""
    if batch.any_penalty:
        assert history is not None, "penalties need the history of tokens"
        penalised_PV = _penalised(logits_BV[history.rows_P], batch, history)
        logits_BV = logits_BV.index_copy(0, history.rows_P, penalised_PV)
    if batch.biases is not None:
        entries = batch.biases
        where = (entries.rows_N, entries.ids_N)
        logits_BV = logits_BV.index_put(where, logits_BV[where] + entries.values_N)
    if batch.min_stops is not None:
        assert num_tokens_B is not None, "min-tokens needs the number of tokens so far"
        entries = batch.min_stops
        where = (entries.rows_N, entries.ids_N)
        too_early_N = num_tokens_B[entries.rows_N] < entries.values_N
        logits_BV = logits_BV.index_put(where, logits_BV[where].masked_fill(too_early_N, -torch.inf))
    return logits_BV


def _penalised(logits_PV: Tensor, batch: SamplingBatch, history: TokenHistory) -> Tensor:
    rows_P, counts_PV = history.rows_P, history.counts_PV
    generated_PV = counts_PV > 0
    repetition_PV = torch.where(generated_PV | history.in_prompt_PV, batch.repetition_B[rows_P].unsqueeze(1), 1.0)
    logits_PV = torch.where(logits_PV > 0, logits_PV / repetition_PV, logits_PV * repetition_PV)
    logits_PV = logits_PV - batch.frequency_B[rows_P].unsqueeze(1) * counts_PV
    return logits_PV - batch.presence_B[rows_P].unsqueeze(1) * generated_PV


def _filter_cut(logits_BV: Tensor, batch: SamplingBatch) -> Tensor | None:
    """Per row the smallest logit that top-k, top-p and min-p all let through; `None` when no row filters.

    Expects the largest logit of each row at 0, so `exp(logit)` is the probability relative to the best token's.
    """
    if not (batch.max_top_k or batch.needs_sort or batch.any_min_p):
        return None
    cut_B = logits_BV.new_full((batch.num_rows,), -torch.inf)
    if batch.max_top_k:
        top_BK = logits_BV.topk(batch.max_top_k).values
        has_top_k_B = batch.top_k_B < batch.vocab_size
        kth_B = top_BK.gather(1, (batch.top_k_B.clamp(max=batch.max_top_k) - 1).unsqueeze(1)).squeeze(1)
        cut_B = torch.where(has_top_k_B, kth_B, cut_B)
        if batch.any_top_p_with_top_k:
            mass_B = logits_BV.exp().masked_fill(logits_BV < cut_B.unsqueeze(1), 0).sum(-1, dtype=torch.float64)
            nucleus_B = _nucleus_cut(top_BK, cut_B, mass_B, batch.top_p_B)
            cut_B = torch.where(has_top_k_B, torch.maximum(cut_B, nucleus_B), cut_B)
    if batch.sorted_rows is not None:
        rows = batch.sorted_rows
        sorted_SV = logits_BV[rows].sort(descending=True).values
        mass_S = sorted_SV.exp().sum(-1, dtype=torch.float64)
        cut_B = cut_B.index_copy(0, rows, _nucleus_cut(sorted_SV, cut_B[rows], mass_S, batch.top_p_B[rows]))
    return torch.maximum(cut_B, batch.min_p_B.log()) if batch.any_min_p else cut_B


def _nucleus_cut(sorted_BK: Tensor, cut_B: Tensor, mass_B: Tensor, top_p_B: Tensor) -> Tensor:
    """Top-p among the logits at or above `cut_B`, whose exponentials sum to `mass_B`: the smallest logit it keeps.

    A token stays when those before it hold less than `top_p` of the mass. `sorted_BK` holds, in descending order,
    at least every logit above `cut_B` (ties at it may be missing: they only matter when everything stays).
    """
    weights_BK = sorted_BK.double().exp()
    before_BK = weights_BK.cumsum(-1) - weights_BK
    stays_BK = (before_BK < (top_p_B * mass_B).unsqueeze(1)) & (sorted_BK >= cut_B.unsqueeze(1))
    nucleus_B = sorted_BK.masked_fill(~stays_BK, torch.inf).amin(-1)
    return torch.where(top_p_B < 1, nucleus_B, cut_B)


# --- the draw -----------------------------------------------------------------------------------------


def sample(logits_BV: Tensor, batch: SamplingBatch, position: Tensor | int, slot: int) -> Tensor:
    """Draw one token per row from processed logits.

    Args:
        logits_BV: what `process_logits` returned.
        position: int64 `[B]`, the row's own count of what came before (its pair index); or one for all.
        slot: what the draw is for: `TOKEN1`, `TOKEN2`, ….

    Returns:
        int64 `[B]`. Never a token of zero probability.
    """
    if batch.all_greedy:
        return logits_BV.argmax(-1)
    drawn_B = _draw(logits_BV.softmax(-1, dtype=torch.float32), uniform(batch.key_B, position, slot))
    return torch.where(batch.greedy_B, logits_BV.argmax(-1), drawn_B) if batch.any_greedy else drawn_B


def probabilities(logits_BV: Tensor, batch: SamplingBatch) -> Tensor:
    """float32 `[B, V]`: the distribution that `sample` draws from, one-hot in greedy rows."""
    if not batch.any_greedy:
        return logits_BV.softmax(-1, dtype=torch.float32)
    best_B1 = logits_BV.argmax(-1, keepdim=True)
    one_hot_BV = torch.zeros_like(logits_BV, dtype=torch.float32).scatter_(1, best_B1, 1.0)
    if batch.all_greedy:
        return one_hot_BV
    return torch.where(batch.greedy_B.unsqueeze(1), one_hot_BV, logits_BV.softmax(-1, dtype=torch.float32))


def _draw(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Inverse of the cumulated distribution at one uniform per row."""
    # Whole numbers below 2⁵³: their running sums are exact, so a token without mass never moves the sum.
    cumulated_BV = (probabilities_BV.double() * _RESOLUTION).floor_().cumsum(-1)
    return torch.searchsorted(cumulated_BV, (uniform_B * cumulated_BV[:, -1]).unsqueeze(1), right=True).squeeze(1)


# --- randomness ---------------------------------------------------------------------------------------


def derive_seed(seed: int, index: int) -> int:
    """Seed of sample `index` of a request: the request's own for the first, unrelated ones for the others."""
    return seed if index == 0 else splitmix64(splitmix64(seed) ^ index)


def uniform(key_B: Tensor, position: Tensor | int, slot: int) -> Tensor:
    """float64 `[B]` in [0, 1): a hash of the row's key, position and slot. Stateless, the same on every device."""
    x = (key_B ^ (position * _SLOTS + slot)) + _GAMMA
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 11).double() * 2.0**-53


_SLOTS = 8
_GAMMA, _MIX1, _MIX2 = (signed64(c) for c in SPLITMIX64)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift without copying the sign. Products of int64 wrap, as the hash wants."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


# --- speculative decoding -----------------------------------------------------------------------------


class Verdict(NamedTuple):
    """Verification of one draft per row: whether it stands, and the token to take where it doesn't."""

    accepted_B: Tensor
    replacement_B: Tensor


def speculative_verify(
    target_BV: Tensor, draft_BV: Tensor, draft_ids_B: Tensor, accept_uniform_B: Tensor, residual_uniform_B: Tensor
) -> Verdict:
    """Lossless verification (Leviathan et al., 2023): the token that results is distributed as the target.

    A draft x ~ q stands with probability min(1, p(x)/q(x)); else one is drawn from (p − q)₊, normalised.

    Args:
        target_BV: p, the target's `probabilities` after the same context.
        draft_BV: q, the `probabilities` that the draft was drawn from.
        draft_ids_B: int64, the drafts.
        accept_uniform_B: `uniform(…, VERIFY)`.
        residual_uniform_B: `uniform(…, RESIDUAL)`.
    """
    target_B = target_BV.gather(1, draft_ids_B.unsqueeze(1)).squeeze(1).double()
    draft_B = draft_BV.gather(1, draft_ids_B.unsqueeze(1)).squeeze(1).double()
    accepted_B = accept_uniform_B * draft_B < target_B
    residual_BV = (target_BV.double() - draft_BV.double()).clamp_(min=0)
    total_B1 = residual_BV.sum(-1, keepdim=True)
    # No residual means p = q: a rejection is then rounding, and the target itself is what is left.
    residual_BV = torch.where(total_B1 > 0, residual_BV / total_B1, target_BV.double())
    return Verdict(accepted_B, _draw(residual_BV, residual_uniform_B))


# --- log-probabilities --------------------------------------------------------------------------------


class TokenLogprobs(NamedTuple):
    """Log-probabilities, float32: of the chosen tokens `[B]`, and the K best tokens with theirs `[B, K]`.

    `drawn_B`: of the chosen tokens under the distribution that they were drawn from, where somebody asked for it.
    """

    chosen_B: Tensor
    top_ids_BK: Tensor
    top_BK: Tensor
    drawn_B: Tensor | None = None


def token_logprobs(
    logits_BV: Tensor, token_ids_B: Tensor, num_top: int = 0, num_named: int | None = None
) -> TokenLogprobs:
    """Log-probabilities under the model's own distribution: raw logits, before temperature, penalties and filters.

    `num_named`: only the first so many entries can be alternatives; by default all.
    """
    logits_BV = logits_BV.float()
    normaliser_B1 = logits_BV.logsumexp(-1, keepdim=True)
    chosen_B1 = logits_BV.gather(1, token_ids_B.unsqueeze(1)) - normaliser_B1
    named_BN = logits_BV[:, :num_named]
    top = named_BN.topk(min(num_top, named_BN.shape[-1]))
    return TokenLogprobs(chosen_B1.squeeze(1), top.indices, top.values - normaliser_B1)


def drawn_logprobs(processed_BV: Tensor, batch: SamplingBatch, token_ids_B: Tensor) -> Tensor:
    """Float32 `[B]`: log-probabilities of drawn tokens under what :func:`sample` drew from; 0 in greedy rows.

    Args:
        processed_BV: what :func:`process_logits` returned.
    """
    found_B = processed_BV.gather(1, token_ids_B.unsqueeze(1)).squeeze(1) - processed_BV.logsumexp(-1)
    return found_B.masked_fill(batch.greedy_B, 0.0) if batch.any_greedy else found_B
