"""Fitting the row for elsewhere of a draft vocabulary: one more row of the head, for all the ids that it leaves out.

Where p is the second head's own distribution and S the draft vocabulary, the row's logit should be the log-sum-exp of the logits outside S,
so that with it a draw falls elsewhere with probability 1 − p(S). That is no linear function of the hidden state, but close to one.

Shape legend: N drafts, H width, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipo.data.collate import collate_slots
from pipo.data.conversation import Turn
from pipo.errors import DataError
from pipo.model.modeling import PipoForCausalLM
from pipo.pairing import IGNORE_INDEX, TOKEN2_LABELS, cut_slots, reject_drafts, slots_from_turns

MAX_SLOTS = 2048
"""Slots of a conversation that are read."""
CHUNK = 256
"""Drafts whose logits are in memory at a time."""
DECAY = 1e-4
"""Of the row, for each unit of its logit's variance."""


@dataclass(frozen=True)
class Outside:
    """What the row is fitted to. `hidden [N, H]`, float32: the MTP block's states. `inside`, `outside [N]`: log-sum-exp of the logits of
    ids in the draft vocabulary, and of the others."""

    hidden: Tensor
    inside: Tensor
    outside: Tensor

    @property
    def mass(self) -> Tensor:
        """`[N]`: probability that the second head gives to the ids outside."""
        return torch.sigmoid(self.outside - self.inside)


@dataclass(frozen=True)
class ElsewhereFigures:
    """How well a row tells the probability of all ids outside, on conversations that it was not fitted to.

    `mass`: the mean probability outside, and so the drafts that are lost. `estimated`: by the row. `error`: the mean absolute difference.
    """

    num_fitted: int
    num_drafts: int
    mass: float
    estimated: float
    error: float


@torch.no_grad()
def look_outside(
    model: PipoForCausalLM,
    ids: Sequence[int],
    conversations: Sequence[tuple[Turn, ...]],
    most: int,
    seed: int,
    note: Callable[[int], None] = lambda number: None,
) -> Outside:
    """The first `most` drafts of conversations, each laid out as by a gate that rejects a random share.

    Args:
        note: told how many drafts there are, after each conversation.
    """
    rng = random.Random(f"elsewhere-{seed}")
    pad_id = int(model.config.pad_token_id)
    inside_V = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=model.device)
    inside_V[list(ids)] = True
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    found = 0
    for turns in conversations:
        slots = slots_from_turns(turns, pad_id)
        slots = cut_slots(reject_drafts(slots, rng.random(), rng, pad_id), MAX_SLOTS)
        batch = {name: tensor.to(model.device) for name, tensor in collate_slots([slots], pad_id).items()}
        mask = batch["labels"][:, TOKEN2_LABELS] != IGNORE_INDEX
        hidden_NH = model(batch["input_ids"], batch["attention_mask"]).mtp_hidden[mask][: most - found]
        for chunk in hidden_NH.split(CHUNK):
            logits_NV = model.sampling_logits(chunk)
            pair = (logits_NV.masked_fill(~keep, -torch.inf).logsumexp(-1) for keep in (inside_V, ~inside_V))
            parts.append((chunk.float().cpu(), *(one.cpu() for one in pair)))
        found += len(hidden_NH)
        note(found)
        if found >= most:
            break
    if not found:
        raise DataError("the conversations have no drafts that a row for elsewhere could be fitted to")
    return Outside(*(torch.cat(column) for column in zip(*parts, strict=True)))


def fit_elsewhere(
    model: PipoForCausalLM, fit: Outside, held_out: Outside
) -> tuple[tuple[float, ...], ElsewhereFigures]:
    """The row and its offset `[H + 1]`, by logistic regression of the mass outside, and how well it does on `held_out`."""
    scale = fit.hidden.square().mean().sqrt()
    row_H, offset = torch.zeros(fit.hidden.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([row_H, offset], max_iter=300, line_search_fn="strong_wolfe")

    def odds(of: Outside, row_H: Tensor) -> Tensor:
        return model.backbone.scale_logits(of.hidden @ row_H) + offset - of.inside

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(odds(fit, row_H), fit.mass)
        value = value + DECAY * scale.square() * row_H.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        served_H = row_H.to(model.dtype).float()
        estimated = torch.sigmoid(odds(held_out, served_H))
    figures = ElsewhereFigures(
        len(fit.inside),
        len(held_out.inside),
        mass=float(held_out.mass.mean()),
        estimated=float(estimated.mean()),
        error=float((estimated - held_out.mass).abs().mean()),
    )
    return (*served_H.tolist(), offset.item()), figures
