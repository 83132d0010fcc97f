"""The pair step, around SGLang's sampling: token 1 by SGLang as ever, MTP block, gate, token 2, and the pair's id. Section 3.3.

Nothing here waits for the device, with two exceptions: rows that a grammar limits (:mod:`.grammar`), and on a CPU the look at the gate.

Shape legend: N pairs of all requests, one after the other (one each when decoding); R requests; H width; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from pipo.integrations.sglang import grammar, pair_ids
from pipo.integrations.sglang.graph import SecondPhase
from pipo.integrations.sglang.hooks import Hook
from pipo.integrations.sglang.logprobs import join_logprobs
from pipo.integrations.sglang.serving import current, served
from pipo.losses.draft import draft_features
from pipo.model.step import finite_rows
from pipo.pairing import accept

Sample = Callable[[Any, Any, Any], Tensor]


def around_sample(sample: Sample, runner: Any, logits_output: Any, forward_batch: Any) -> Tensor:
    """Pair ids, int64 `[R]`, in the place of the next tokens."""
    if served() is None:
        return sample(runner, logits_output, forward_batch)
    hidden_NH, logits_output.hidden_states = logits_output.hidden_states, None
    last_R = None if forward_batch.forward_mode.is_decode() else forward_batch.extend_seq_lens.cumsum(0) - 1
    hidden_RH = hidden_NH if last_R is None else hidden_NH[last_R]

    draws = Draws(sample, runner, forward_batch)
    token1_R = draws(logits_output, slot=0)
    graph = getattr(logits_output, "pipo_graph", None)  # where SGLang replayed one
    if graph is None:
        draft = write_draft(draws, hidden_RH, token1_R, run_mtp(runner, forward_batch, hidden_NH, token1_R, last_R))
    else:
        draft = write_draft(draws, hidden_RH, token1_R, graph.replay(hidden_RH, token1_R))
    join_logprobs(logits_output, draft.output)
    ids_R = pair_ids.join(token1_R, draft.token_R, draft.committed_R)
    # SGLang ends a request at an id that is none; its neighbours go on.
    ids_R = torch.where(hidden_RH.isfinite().all(-1), ids_R, pair_ids.pair_id(current().vocab_size, None))
    # Where SGLang makes the ranks agree on tokens, they agree on the gate too.
    runner.sampler._sync_token_ids_across_tp(ids_R, forward_batch.sampling_info)
    return ids_R


class Draws:
    """SGLang's own sampling, with penalties of pairs, once for each slot of a pair."""

    def __init__(self, sample: Sample, runner: Any, forward_batch: Any) -> None:
        self.runner, self.forward_batch = runner, forward_batch
        self.rows = forward_batch.sampling_info.pairs
        self._sample = sample

    def __call__(self, output: Any, slot: int) -> Tensor:
        """Token ids, int64 `[R]`, from logits that are used up; with log-probabilities in `output` where somebody asks."""
        self.rows.penalties.apply_(output.next_token_logits)
        return self._sample(self.runner, output, self._at(slot)).long()

    def _at(self, slot: int) -> Any:
        """The batch as a seeded draw is to see it: each slot of a text is a position of its own."""
        if self.forward_batch.sampling_info.sampling_seed is None:
            return self.forward_batch
        view = copy(self.forward_batch)
        view.forward_mode = ForwardMode.DECODE  # where SGLang takes positions as they are
        view.positions = 2 * self.forward_batch.seq_lens + slot
        return view


def run_mtp(runner: Any, forward_batch: Any, hidden_NH: Tensor, token1_R: Tensor, last_R: Tensor | None) -> SecondPhase:
    """The MTP block at every pair, which fills its cache; kept of each request's last pair, at `last_R` (`None`: each has one).

    Also where no draft can be committed: a request that does commit may share these pairs later.
    """
    next_N = token1_R
    if last_R is not None:
        next_N = pair_ids.next_token1(forward_batch.input_ids)
        given_R = next_N[last_R]  # known where a part of a prompt was read that goes on
        next_N[last_R] = torch.where(given_R == pair_ids.NO_TOKEN, token1_R, given_R)
    with forward_context(ForwardContext(attn_backend=runner.attn_backend), forward_batch=forward_batch):
        mtp_hidden_NH = runner.model.draft(next_N, hidden_NH, forward_batch.positions, forward_batch)
    return SecondPhase(*finite_rows(mtp_hidden_NH if last_R is None else mtp_hidden_NH[last_R]))


class Draft(NamedTuple):
    """Token 2 of each request, and whether it stands."""

    token_R: Tensor
    committed_R: Tensor
    output: Any = None
    """Its log-probabilities, where somebody asks; `None` where nothing was drawn."""


def write_draft(draws: Draws, hidden_RH: Tensor, token1_R: Tensor, phase: SecondPhase) -> Draft:
    """Draw token 2 and judge it, and count what the request shows."""
    rows, model = draws.rows, draws.runner.model
    rows.penalties.count(token1_R)
    nothing = Draft(token1_R, torch.zeros_like(token1_R, dtype=torch.bool))
    if not rows.any_drafts:
        return nothing
    states, confidence_R, committed_R = (hidden_RH, phase.mtp_hidden_RH), phase.confidence_R, phase.finite_R
    sees_draft = model.confidence_head.draft is not None
    if not sees_draft:
        confidence_R = model.confidence(*states) if confidence_R is None else confidence_R
        committed_R = phase.finite_R & accept(confidence_R, rows.threshold_R)
    logits_RV = _second_head(draws, phase, committed_R)
    if logits_RV is None:
        return nothing
    # Of the head's own distribution, whatever the draft is drawn from.
    log_probs_RV = torch.log_softmax(logits_RV, dim=-1) if sees_draft else None
    output = LogitsProcessorOutput(next_token_logits=logits_RV)
    with grammar.one_ahead(draws.forward_batch.sampling_info, token1_R) as withheld:
        token_R = draws(output, slot=1)
    if log_probs_RV is not None:
        features_R3 = draft_features(log_probs_RV, log_probs_RV.gather(1, token_R[:, None])[:, 0])
        committed_R = phase.finite_R & accept(model.confidence(*states, features_R3), rows.threshold_R)
    if withheld:
        committed_R[withheld] = False
    rows.penalties.count(token_R, committed_R)
    return Draft(token_R, committed_R, output)


def _second_head(draws: Draws, phase: SecondPhase, wanted_R: Tensor) -> Tensor | None:
    """Logits of token 2 where it is wanted, and `None` if it is nowhere.

    To look at that would stall a GPU, and ranks that saw it differently would wait for each other for ever: so only a single CPU looks.
    """
    model, forward_batch = draws.runner.model, draws.forward_batch
    if phase.logits_RV is not None:
        return phase.logits_RV
    if wanted_R.device.type != "cpu" or get_parallel().tp_size > 1 or bool(wanted_R.all()):
        everywhere_RV: Tensor = model.second_logits(phase.mtp_hidden_RH, forward_batch)
        return everywhere_RV
    if not wanted_R.any():
        return None
    some_CV: Tensor = model.second_logits(phase.mtp_hidden_RH[wanted_R], forward_batch)
    return some_CV.new_zeros(len(wanted_R), some_CV.shape[-1]).index_put((wanted_R,), some_CV)


HOOKS = (
    Hook(
        "model_executor.model_runner.ModelRunner.sample",
        "around",
        around_sample,
        ("self", "logits_output", "forward_batch"),
    ),
)
