"""The pair step: prefill a prompt, or read the last pair; write token 1, judge the draft, write token 2. Section 3.3.

Used by `model.generate`, by the engine, and (its parts) by the baselines. Nothing here waits for the device except where
it says so.

Shape legend: B rows, L positions (pairs, or tokens of a regular model), T slots, H width, V vocabulary, K alternatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pipo.losses.draft import draft_features_of_logits
from pipo.model.blocks import largest, row_by_row
from pipo.model.cache import RowCache
from pipo.model.draft_vocab import NO_DRAFT
from pipo.model.modeling import PipoForCausalLM
from pipo.model.rows import Rows
from pipo.model.sampling import TokenLogprobs
from pipo.pairing import accept


class PairResult(NamedTuple):
    """One step's pairs, on the device."""

    token1_B: Tensor
    """int64."""
    draft_B: Tensor
    """int64, `NO_DRAFT` where none was drawn."""
    confidence_B: Tensor
    """float32, NaN where the MTP block was not run."""
    committed_B: Tensor
    """bool."""
    finite_B: Tensor
    """bool: False where the hidden state is not finite, and the row's tokens mean nothing."""
    logprobs1: TokenLogprobs | None
    logprobs2: TokenLogprobs | None


def write_pair(
    model: PipoForCausalLM, hidden_BH: Tensor, rows: Rows, run_mtp: Callable[[Tensor], Tensor] | None
) -> PairResult:
    """From the last pair's hidden state to the next pair: token 1, MTP, gate, token 2.

    Args:
        run_mtp: from token 1 `[B]` to `d [B, H]`, filling the MTP block's cache; `None` where no row can commit a draft.
    """
    hidden_BH, finite_B = finite_rows(hidden_BH)
    token1_B, logprobs1 = rows.draw(model.sampling_logits(hidden_BH))
    rows.count(token1_B)
    if run_mtp is None:
        return single_tokens(token1_B, finite_B, logprobs1)
    mtp_hidden_BH, _ = finite_rows(run_mtp(token1_B))
    order = _draw_and_judge if model.gate_sees_draft else _judge_and_draw
    draft = order(model, hidden_BH, mtp_hidden_BH, token1_B, rows)
    rows.count(draft.token_B.clamp_min(0), draft.committed_B)
    shown_B = draft.token_B if draft.drawn_B is None else draft.token_B.masked_fill(~draft.drawn_B, NO_DRAFT)
    return PairResult(token1_B, shown_B, draft.confidence_B, draft.committed_B, finite_B, logprobs1, draft.logprobs)


class _Draft(NamedTuple):
    """Token 2 of every row. `drawn_B`: where there is one; `None`: everywhere."""

    token_B: Tensor
    confidence_B: Tensor
    committed_B: Tensor
    drawn_B: Tensor | None
    logprobs: TokenLogprobs | None


def _judge_and_draw(
    model: PipoForCausalLM, hidden_BH: Tensor, mtp_hidden_BH: Tensor, token1_B: Tensor, rows: Rows
) -> _Draft:
    """The paper's gate knows the hidden states alone, so what it rejects need not be drawn."""
    confidence_B = model.confidence(hidden_BH, mtp_hidden_BH)
    committed_B = accept(confidence_B, rows.batch.threshold_B)
    logits_BV, drawn_B = _second_head(model, mtp_hidden_BH, committed_B, rows)
    if logits_BV is None:
        return _Draft(token1_B, confidence_B, committed_B, drawn_B, None)
    drawn = rows.draw_draft(logits_BV, token1_B)
    return _Draft(drawn.token_B, confidence_B, committed_B & (drawn.token_B != NO_DRAFT), drawn_B, drawn.logprobs)


def _draw_and_judge(
    model: PipoForCausalLM, hidden_BH: Tensor, mtp_hidden_BH: Tensor, token1_B: Tensor, rows: Rows
) -> _Draft:
    """A gate that sees the draft needs one. It is told of the head's own distribution, whatever the draft was drawn from."""
    logits_BV = rows.draft_logits(model, mtp_hidden_BH)
    drawn = rows.draw_draft(logits_BV, token1_B)
    best_B2 = largest(logits_BV, 2).values_BK
    features_B3 = row_by_row(draft_features_of_logits, logits_BV, drawn.place_B, best_B2)
    confidence_B = model.confidence(hidden_BH, mtp_hidden_BH, features_B3)
    committed_B = accept(confidence_B, rows.batch.threshold_B) & (drawn.token_B != NO_DRAFT)
    return _Draft(drawn.token_B, confidence_B, committed_B, None, drawn.logprobs)


def single_tokens(token1_B: Tensor, finite_B: Tensor, logprobs1: TokenLogprobs | None) -> PairResult:
    """A step that wrote token 1 alone."""
    none_B = torch.full_like(token1_B, NO_DRAFT)
    nan_B = torch.full(token1_B.shape, torch.nan, device=token1_B.device)
    nothing_B = torch.zeros_like(token1_B, dtype=torch.bool)
    return PairResult(token1_B, none_B, nan_B, nothing_B, finite_B, logprobs1, None)


def finite_rows(hidden_BH: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states with zeros in rows that are not finite, and which rows are: one bad row must not stop the others."""
    finite_B = hidden_BH.isfinite().all(-1)
    return hidden_BH.masked_fill(~finite_B[:, None], 0), finite_B


def _second_head(
    model: PipoForCausalLM, mtp_hidden_BH: Tensor, committed_B: Tensor, rows: Rows
) -> tuple[Tensor | None, Tensor | None]:
    """Logits of token 2 and for which rows they hold (`None`: all). Rejected drafts that nobody wants cost nothing.

    Looking at the gate would stall a GPU, so there the head is run for all rows.
    """
    if rows.captured or mtp_hidden_BH.device.type != "cpu":
        return rows.draft_logits(model, mtp_hidden_BH), None
    wanted_B = committed_B.clone()
    wanted_B[list(rows.records)] = True
    num_wanted = int(wanted_B.sum())
    if num_wanted == 0:
        return None, wanted_B
    if num_wanted == len(wanted_B):
        return rows.draft_logits(model, mtp_hidden_BH), None
    some_NV = rows.draft_logits(model, mtp_hidden_BH[wanted_B])
    return some_NV.new_zeros(len(wanted_B), some_NV.shape[-1]).index_put((wanted_B,), some_NV), wanted_B


# --- decode -------------------------------------------------------------------------------------------


def read_pairs(model: PipoForCausalLM, slots_B2: Tensor, cache: RowCache) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Read each row's last pair: `h [B, H]`, and how to run the MTP block after it (for :func:`write_pair`)."""
    positions_B1 = cache.begin()
    latents_B1H = model.compress(slots_B2)
    hidden_B1H, call = model.run_backbone(latents_B1H, positions_B1, cache.masks(latents_B1H.dtype), cache)

    def run_mtp(token1_B: Tensor) -> Tensor:
        return model.run_mtp(token1_B[:, None], hidden_B1H, call, cache)[:, 0]

    return hidden_B1H[:, 0], run_mtp


def slots_of_result(result: PairResult, pad_token_id: int) -> Tensor:
    """The slots `[B, 2]` of the pairs that a step wrote: what the next step reads."""
    token2_B = result.draft_B.masked_fill(~result.committed_B, pad_token_id)
    return torch.stack([result.token1_B, token2_B], dim=1)


# --- to the host --------------------------------------------------------------------------------------


class HostPairs(NamedTuple):
    """A `PairResult` as Python values, one entry per row."""

    token1: list[int]
    draft: list[int | None]
    confidence: list[float | None]
    committed: list[bool]
    finite: list[bool]
    logprob1: list[float | None]
    logprob2: list[float | None]
    drawn1: list[float | None]
    """Under the distribution that token 1 was drawn from; `None` where no row asked for its records."""
    drawn2: list[float | None]
    top1: list[list[tuple[int, float]]]
    top2: list[list[tuple[int, float]]]


def fetch(result: PairResult) -> HostPairs:
    """Bring a step's result to the host: **the one synchronisation of a step**, in one copy.

    Token ids travel as float64, which holds them exactly.
    """
    return unpack(pack(result).cpu(), result.logprobs1, result.logprobs2)


def pack(result: PairResult) -> Tensor:
    """A step's result as one table on the device, float64 `[columns, B]`, for :func:`unpack`."""
    columns = [result.token1_B, result.draft_B, result.committed_B, result.confidence_B, result.finite_B]
    for logprobs in (result.logprobs1, result.logprobs2):
        if logprobs is not None:
            columns += [logprobs.chosen_B, *logprobs.top_ids_BK.unbind(1), *logprobs.top_BK.unbind(1)]
            columns += [] if logprobs.drawn_B is None else [logprobs.drawn_B]
    return torch.stack([column.double() for column in columns])


def unpack(packed: Tensor, logprobs1: TokenLogprobs | None = None, logprobs2: TokenLogprobs | None = None) -> HostPairs:
    """What :func:`pack` made of a result, on the host; the log-probabilities tell which columns there are."""
    table = packed.tolist()
    num_rows, cursor = len(table[0]), 5
    confidence = [None if value != value else float(value) for value in table[3]]
    chosen: list[list[float | None]] = []
    drawn: list[list[float | None]] = []
    tops: list[list[list[tuple[int, float]]]] = []
    for logprobs in (logprobs1, logprobs2):
        if logprobs is None:
            chosen.append([None] * num_rows)
            drawn.append([None] * num_rows)
            tops.append([[] for _ in range(num_rows)])
            continue
        k = logprobs.top_BK.shape[1]
        chosen.append(table[cursor])
        ids, values = table[cursor + 1 : cursor + 1 + k], table[cursor + 1 + k : cursor + 1 + 2 * k]
        tops.append([[(int(ids[j][b]), values[j][b]) for j in range(k)] for b in range(num_rows)])
        cursor += 1 + 2 * k
        drawn.append([None] * num_rows if logprobs.drawn_B is None else table[cursor])
        cursor += logprobs.drawn_B is not None
    return HostPairs(
        [int(value) for value in table[0]],
        [None if value == NO_DRAFT else int(value) for value in table[1]],
        confidence,
        [bool(value) for value in table[2]],
        [bool(value) for value in table[4]],
        chosen[0],
        chosen[1],
        drawn[0],
        drawn[1],
        tops[0],
        tops[1],
    )
