"""The terms of a training step, taken inside a model's forward, against the executable specification."""

import random

import pytest
import torch

from families import base_model, pipo_model
from pipo import reference
from pipo.errors import ConfigError
from pipo.losses import DistilledObjective, FullTeacher, NumItems, SupervisedObjective
from pipo.pairing import (
    IGNORE_INDEX,
    TOKEN1_LABELS,
    TOKEN2_LABELS,
    Slots,
    reject_drafts,
    slots_from_turns,
    teacher_positions_of_steps,
    teacher_tokens,
)

PAD = 0


def rollout(vocab_size, seed=0, length=21):
    rng = random.Random(seed)
    tokens = [rng.randrange(1, vocab_size) for _ in range(length)]
    return reject_drafts(slots_from_turns([(tokens[:7], False), (tokens[7:], True)], PAD), 0.5, rng, PAD)


def teachers(teacher_NV, row: Slots):
    return [FullTeacher(teacher_NV[torch.tensor(p)][None]) for p in teacher_positions_of_steps(row.filler)]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["full", "topk", "sampled"])
def test_a_distilled_forward_is_the_reference(mode):
    """Breaks when steps, teacher positions, rejected drafts' labels or weights are mixed up between the two heads."""
    model, teacher = pipo_model("qwen3").train(), base_model("qwen3", seed=1)
    row = rollout(model.config.vocab_size)
    assert any(pad and label != IGNORE_INDEX for pad, label in zip(row.filler, row.labels, strict=True))
    ids, labels = torch.tensor([row.ids]), torch.tensor([row.labels])
    with torch.no_grad():
        teacher_NV = teacher(torch.tensor([teacher_tokens(row)]), return_logits=True).logits[0]
    objective = DistilledObjective(*teachers(teacher_NV, row), mode=mode, k=4, mtp_weight=0.5, confidence_weight=2.0)
    found = model(ids, labels=labels, objective=objective, return_logits=True)
    wanted = reference.opd_losses(
        found.logits[0], found.mtp_logits[0], found.confidence_logits[0], teacher_NV, row, mode, top_k=4
    )
    total = wanted.total(mtp_weight=0.5, confidence_weight=2.0)
    torch.testing.assert_close(found.loss, total, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.mtp_loss, wanted.mtp, rtol=1e-4, atol=1e-5)
    expected = gradients(model, total)
    again = model(ids, labels=labels, objective=objective)
    for name, gradient in gradients(model, again.loss).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    assert found.confidence.shape == found.confidence_target.shape
    assert not found.confidence.requires_grad


def test_rows_apart_are_rows_together():
    """Each row alone, divided by the counts of all: the same gradient as one batch. Breaks when a term takes its own mean."""
    model = pipo_model("qwen3_5").train()
    rows = [rollout(model.config.vocab_size, seed, length=15) for seed in range(3)]
    rows = [Slots(r.ids[:16], r.labels[:16], r.filler[:16]) for r in rows]
    ids, labels = torch.tensor([r.ids for r in rows]), torch.tensor([r.labels for r in rows])
    counts = NumItems(*(int((labels[:, which] != IGNORE_INDEX).sum()) for which in (TOKEN1_LABELS, TOKEN2_LABELS)))
    whole = gradients(model, model(ids, labels=labels).loss)
    model.zero_grad()
    for row in range(3):
        part = model(ids[row : row + 1], labels=labels[row : row + 1], objective=SupervisedObjective(counts))
        part.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-6, msg=name)


def test_settings_that_contradict_each_other_are_refused():
    teacher = FullTeacher(torch.zeros(1, 3, 5))
    with pytest.raises(ConfigError, match="beta must be 1"):
        DistilledObjective(teacher, teacher, mode="sampled", beta=0.5)
    with pytest.raises(ConfigError, match="ratios belong"):
        DistilledObjective(teacher, teacher, mode="full", ratios1=torch.ones(1, 3))
    with pytest.raises(ConfigError, match="mode must be"):
        DistilledObjective(teacher, teacher, mode="best")
