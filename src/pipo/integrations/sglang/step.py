"""The pair step, around SGLang's sampling: token 1 by SGLang as ever, MTP block, gate, token 2, and the pair's id. Section 3.3.

Shape legend: N pairs of all requests, one after the other (one each when decoding); R requests; H width; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from torch import Tensor

from pipo.integrations.sglang import pair_ids
from pipo.integrations.sglang.hooks import Hook
from pipo.integrations.sglang.serving import served
from pipo.losses.draft import draft_features
from pipo.pairing import accept

Sample = Callable[[Any, Any, Any], Tensor]


def around_sample(sample: Sample, runner: Any, logits_output: Any, forward_batch: Any) -> Tensor:
    """Pair ids, int64 `[R]`, in the place of the next tokens."""
    if served() is None:
        return sample(runner, logits_output, forward_batch)
    hidden_NH = logits_output.hidden_states
    logits_output.hidden_states = None
    token1_R = sample(runner, logits_output, forward_batch).long()
    hidden_RH, mtp_hidden_RH = run_mtp(runner, forward_batch, hidden_NH, token1_R)
    draft = write_draft(sample, runner, forward_batch, hidden_RH, mtp_hidden_RH, token1_R)
    return pair_ids.join(token1_R, draft.token_R, draft.committed_R)


def run_mtp(runner: Any, forward_batch: Any, hidden_NH: Tensor, token1_R: Tensor) -> tuple[Tensor, Tensor]:
    """`h` and `d` of each request's last pair, `[R, H]` both; fills the MTP block's cache at every pair that was read."""
    if forward_batch.forward_mode.is_decode():
        next_N, last_R = token1_R, None
    else:
        last_R = forward_batch.extend_seq_lens.cumsum(0) - 1
        next_N = pair_ids.next_token1(forward_batch.input_ids)
        given_R = next_N[last_R]  # known where a part of a prompt was read that goes on
        next_N[last_R] = torch.where(given_R == pair_ids.NO_TOKEN, token1_R, given_R)
    with forward_context(ForwardContext(attn_backend=runner.attn_backend), forward_batch=forward_batch):
        mtp_hidden_NH = runner.model.draft(next_N, hidden_NH, forward_batch.positions, forward_batch)
    return (hidden_NH, mtp_hidden_NH) if last_R is None else (hidden_NH[last_R], mtp_hidden_NH[last_R])


class Draft(NamedTuple):
    """Token 2 of each request, and whether it stands."""

    token_R: Tensor
    committed_R: Tensor


def write_draft(
    sample: Sample, runner: Any, forward_batch: Any, hidden_RH: Tensor, mtp_hidden_RH: Tensor, token1_R: Tensor
) -> Draft:
    """Draw token 2 and judge it."""
    model = runner.model
    logits_RV = model.second_logits(mtp_hidden_RH, forward_batch)
    features_R3 = None
    log_probs_RV = torch.log_softmax(logits_RV, dim=-1) if model.confidence_head.draft is not None else None
    token_R = sample(runner, LogitsProcessorOutput(next_token_logits=logits_RV), forward_batch).long()
    if log_probs_RV is not None:
        features_R3 = draft_features(log_probs_RV, log_probs_RV.gather(1, token_R[:, None])[:, 0])
    confidence_R = model.confidence(hidden_RH, mtp_hidden_RH, features_R3)
    return Draft(token_R, accept(confidence_R, forward_batch.sampling_info.pairs.threshold_R))


HOOKS = (
    Hook(
        "model_executor.model_runner.ModelRunner.sample",
        "around",
        around_sample,
        ("self", "logits_output", "forward_batch"),
    ),
)
