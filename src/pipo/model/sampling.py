"""From logits to tokens: penalties, filters, the draw, log-probabilities, and lossless verification of drafts.

Shapes: B rows of the batch, P rows of it that use penalties, V vocabulary, K most likely tokens.

Nothing here makes a GPU wait. A draw is a pure function of the row's logits, seed and position, so a seeded
request gets the same tokens alone, in any batch, and on any device that gives the same logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipo.model.blocks import argmax, at_least_kth, block_of, in_blocks, largest, pays, row_by_row
from pipo.model.nucleus import nucleus_cut, units
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
    "Kept",
    "SamplingBatch",
    "SamplingSettings",
    "TokenHistory",
    "TokenLogprobs",
    "Verdict",
    "derive_seed",
    "drawn_logprobs",
    "kept_logits",
    "probabilities",
    "process_logits",
    "sample",
    "speculative_verify",
    "token_logprobs",
    "uniform",
]

# What the uniform of a row and position is for; each use has its own.
TOKEN1, TOKEN2, VERIFY, RESIDUAL, BONUS = range(5)


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
    return _filtered(_adjusted(logits_BV.float(), batch, history, num_tokens_B), batch)


class Kept(NamedTuple):
    """Processed logits of tokens that hold all that can be drawn: column k is token `ids_BK[:, k]`, or token k (`None`).

    Ids ascend, so a draw among the columns is the draw among all tokens.
    """

    logits_BK: Tensor
    ids_BK: Tensor | None

    def token(self, column_B: Tensor) -> Tensor:
        """int64 `[B]`: the ids of one column per row."""
        return column_B if self.ids_BK is None else self.ids_BK.gather(1, column_B.unsqueeze(1)).squeeze(1)


def kept_logits(
    logits_BV: Tensor,
    batch: SamplingBatch,
    history: TokenHistory | None = None,
    num_tokens_B: Tensor | None = None,
) -> Kept:
    """As :func:`process_logits`, of few tokens where that is possible: on a CPU, where every row has top-k or is greedy.

    Which tokens tie at the cut has to be looked at, so a GPU works on all.
    """
    adjusted_BV = _adjusted(logits_BV.float(), batch, history, num_tokens_B)
    if adjusted_BV.device.type == "cpu" and batch.max_kept and pays(batch.vocab_size, batch.max_kept):
        near = at_least_kth(adjusted_BV, batch.top_k_B, batch.max_kept)
        if near is not None:
            return Kept(_filtered(near.values_BK, batch), near.ids_BK)
    return Kept(_filtered(adjusted_BV, batch), None)


def _filtered(logits_BK: Tensor, batch: SamplingBatch) -> Tensor:
    """Temperature and filters, on logits of all tokens or of all that top-k lets through."""
    if batch.all_greedy:
        return logits_BK
    logits_BK = (logits_BK - logits_BK.amax(-1, keepdim=True)).div_(batch.temperature_B.unsqueeze(1))
    cut_B = _filter_cut(logits_BK, batch)
    return logits_BK if cut_B is None else logits_BK.masked_fill_(logits_BK < cut_B.unsqueeze(1), -torch.inf)


def _adjusted(
    logits_BV: Tensor, batch: SamplingBatch, history: TokenHistory | None, num_tokens_B: Tensor | None
) -> Tensor:
    """The logits with penalties, biases and suppressed stop ids, before temperature."""
    if batch.any_penalty:
        assert history is not None, "penalties need the history of tokens"
        if len(batch.penalised) == batch.num_rows:
            logits_BV = _penalised(logits_BV, batch, history)
        else:
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
    if batch.any_repetition:
        used_PV = (history.counts_PV > 0) | history.in_prompt_PV
        repetition_PV = torch.where(used_PV, batch.repetition_B[history.rows_P].unsqueeze(1), 1.0)
        logits_PV = torch.where(logits_PV > 0, logits_PV / repetition_PV, logits_PV * repetition_PV)
    return logits_PV - history.penalty_PV


def _filter_cut(logits_BV: Tensor, batch: SamplingBatch) -> Tensor | None:
    """Per row the smallest logit that top-k, top-p and min-p all let through; `None` when no row filters.

    Expects the largest logit of each row at 0, so `exp(logit)` is the probability relative to the best token's.
    """
    if not (batch.max_top_k or batch.nucleus_rows is not None or batch.any_min_p):
        return None
    cut_B = logits_BV.new_full((batch.num_rows,), -torch.inf)
    if batch.max_top_k:
        top_BK = largest(logits_BV, batch.max_top_k).values_BK
        has_top_k_B = batch.top_k_B < batch.vocab_size
        kth_B = top_BK.gather(1, (batch.top_k_B.clamp(max=batch.max_top_k) - 1).unsqueeze(1)).squeeze(1)
        cut_B = torch.where(has_top_k_B, kth_B, cut_B)
        if batch.any_top_p_with_top_k:
            num_kept_B = (logits_BV >= cut_B.unsqueeze(1)).sum(-1)
            nucleus_B = _nucleus_of_top_k(top_BK, cut_B, num_kept_B, batch.top_p_B)
            cut_B = torch.where(has_top_k_B, torch.maximum(cut_B, nucleus_B), cut_B)
    if batch.nucleus_rows is not None:
        rows = batch.nucleus_rows
        all_rows = len(rows) == batch.num_rows
        nucleus_S = row_by_row(nucleus_cut, logits_BV if all_rows else logits_BV[rows], batch.top_p_B[rows])
        cut_B = cut_B.index_copy(0, rows, nucleus_S)
    return torch.maximum(cut_B, batch.min_p_B.log()) if batch.any_min_p else cut_B


def _nucleus_of_top_k(top_BK: Tensor, cut_B: Tensor, num_kept_B: Tensor, top_p_B: Tensor) -> Tensor:
    """Top-p among the logits at or above `cut_B`, `num_kept_B` of them: the smallest logit it keeps.

    A token stays when those before it hold less than `top_p` of the mass. `top_BK` holds, in descending order, at least every
    logit above `cut_B`; of those that tie at it some may be missing, which count here for the mass only.
    """
    kept_BK = top_BK >= cut_B.unsqueeze(1)
    weights_BK = top_BK.double().exp()
    missing_B = num_kept_B - kept_BK.sum(-1)
    mass_B = weights_BK.masked_fill(~kept_BK, 0).sum(-1) + missing_B * cut_B.double().exp()
    before_BK = weights_BK.cumsum(-1) - weights_BK
    stays_BK = (before_BK < (top_p_B * mass_B).unsqueeze(1)) & kept_BK
    nucleus_B = top_BK.masked_fill(~stays_BK, torch.inf).amin(-1)
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
        return argmax(logits_BV)
    uniform_B = uniform(batch.key_B, position, slot)
    drawn_B = row_by_row(lambda logits, u: _draw(logits.exp(), u), logits_BV, uniform_B)
    return torch.where(batch.greedy_B, argmax(logits_BV), drawn_B) if batch.any_greedy else drawn_B


def probabilities(logits_BV: Tensor, batch: SamplingBatch) -> Tensor:
    """float32 `[B, V]`: the distribution that `sample` draws from, one-hot in greedy rows."""
    if not batch.any_greedy:
        return logits_BV.softmax(-1, dtype=torch.float32)
    best_B1 = argmax(logits_BV).unsqueeze(1)
    one_hot_BV = torch.zeros_like(logits_BV, dtype=torch.float32).scatter_(1, best_B1, 1.0)
    if batch.all_greedy:
        return one_hot_BV
    return torch.where(batch.greedy_B.unsqueeze(1), one_hot_BV, logits_BV.softmax(-1, dtype=torch.float32))


def _draw(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Inverse of the cumulated weights, each at most 1, at one uniform per row: first the block, then the token in it.

    Sums of whole units are exact, so a token without weight never moves them, and the token does not depend on how they are made.
    """
    units_BNW = in_blocks(units(weights_BV), 0)
    sums_BN = units_BNW.sum(-1)
    cumulated_BN = sums_BN.cumsum(-1)
    total_B1 = cumulated_BN[:, -1:]
    target_B1 = torch.minimum((uniform_B.unsqueeze(1) * total_B1).long(), total_B1 - 1)
    # Within bounds also for a row of NaN, whose token means nothing: an index beyond them would end a GPU's process.
    block_B1 = torch.searchsorted(cumulated_BN, target_B1, right=True).clamp_(max=sums_BN.shape[1] - 1)
    before_B1 = (cumulated_BN - sums_BN).gather(1, block_B1)
    inside_BW = block_of(units_BNW, block_B1).squeeze(1).cumsum(-1)
    place_B1 = torch.searchsorted(inside_BW, target_B1 - before_B1, right=True)
    return (block_B1 * units_BNW.shape[2] + place_B1).squeeze(1).clamp_(max=weights_BV.shape[1] - 1)


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
    residual_BV = (target_BV - draft_BV).clamp_(min=0)
    total_B1 = residual_BV.sum(-1, keepdim=True)
    # No residual means p = q: a rejection is then rounding, and the target itself is what is left.
    residual_BV = torch.where(total_B1 > 0, residual_BV / total_B1, target_BV)
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
    top = largest(logits_BV[:, :num_named], num_top)
    return TokenLogprobs(chosen_B1.squeeze(1), top.ids_BK, top.values_BK - normaliser_B1)


def drawn_logprobs(processed_BV: Tensor, batch: SamplingBatch, token_ids_B: Tensor) -> Tensor:
    """Float32 `[B]`: log-probabilities of drawn tokens under what :func:`sample` drew from; 0 in greedy rows.

    Args:
        processed_BV: what :func:`process_logits` or :func:`kept_logits` returned; of the latter, columns stand for tokens.
    """
    found_B = processed_BV.gather(1, token_ids_B.unsqueeze(1)).squeeze(1) - processed_BV.logsumexp(-1)
    return found_B.masked_fill(batch.greedy_B, 0.0) if batch.any_greedy else found_B
