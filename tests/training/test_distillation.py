"""From prompts to losses: rollouts by the engine, a teacher, and the objective, against the specification."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from byte_tokenizer import byte_tokenizer
from pipo import PipoForCausalLM, reference
from pipo.data.grade import Grade
from pipo.data.prompts import Prompt
from pipo.data.rows import OpdRow
from pipo.losses import NumItems
from pipo.pairing import IGNORE_INDEX as IGN
from pipo.pairing import teacher_tokens
from pipo.training.config import DivergenceSettings, LossSettings
from pipo.training.distillation import Distillation, RolloutCounts, StudentText
from pipo.training.rollout import EngineRollouts
from pipo.training.teacher import LocalTeacherModel
from rollout_cases import PROMPTS, make_student, make_teacher, pair, rollout, settings

PAD = 256


def distil(model: PipoForCausalLM, mode: Any, teacher: Any = None, **more: Any) -> Distillation:
    rollouts = EngineRollouts(model, settings(max_slots=16))
    divergence = DivergenceSettings(mode=mode, k=4)
    return Distillation(
        rollouts, teacher or LocalTeacherModel(make_teacher()), divergence, LossSettings(), pad_id=PAD, seed=7, **more
    )


def output_of(
    model: PipoForCausalLM, distillation: Distillation, texts: list[StudentText], num: NumItems | None = None
) -> Any:
    width = max(len(text.slots.ids) for text in texts)
    ids = torch.tensor([text.slots.ids + [PAD] * (width - len(text.slots.ids)) for text in texts])
    labels = torch.tensor([text.slots.labels + [IGN] * (width - len(text.slots.labels)) for text in texts])
    return model(input_ids=ids, labels=labels, objective=distillation.objective(texts, num, torch.device("cpu")))


PROMPT_ROWS = [Prompt(index, ids) for index, ids in enumerate(PROMPTS)]


@pytest.mark.parametrize("mode", ["full", "topk", "sampled"])
def test_a_batch_of_rollouts_has_the_losses_and_gradients_of_the_specification(mode: Any):
    """Rejected drafts, odd prompts, rows of different lengths, importance ratios: position by position, without chunks."""
    model, teacher = make_student(), make_teacher()
    distillation = distil(model, mode, LocalTeacherModel(teacher))
    texts = distillation.roll_out(PROMPT_ROWS, step=3)
    assert any(pad and label != IGN for t in texts for pad, label in zip(t.slots.filler, t.slots.labels, strict=True))
    if mode == "sampled":
        assert any(ratio != 1 for text in texts for ratio in text.ratios)
    sums = [torch.zeros(()) for _ in range(3)]
    counts = [0, 0, 0]
    for text in texts:
        output = model(input_ids=torch.tensor([text.slots.ids]), return_logits=True)
        with torch.no_grad():
            teacher_NV = teacher(torch.tensor([teacher_tokens(text.slots)]), return_logits=True).logits[0]
        losses = reference.opd_losses(
            output.logits[0],
            output.mtp_logits[0],
            output.confidence_logits[0],
            teacher_NV,
            text.slots,
            mode,
            top_k=4,
            ratios=text.ratios or None,
        )
        numbers = [sum(label != IGN for label in text.slots.labels[2 + which :: 2]) for which in (0, 1, 1)]
        for which, loss in enumerate(losses):
            sums[which] = sums[which] + loss * numbers[which]
            counts[which] += numbers[which]
    expected = [total / count for total, count in zip(sums, counts, strict=True)]
    found = output_of(model, distillation, texts)
    for name, value in zip(("backbone_loss", "mtp_loss", "confidence_loss"), expected, strict=True):
        torch.testing.assert_close(getattr(found, name), value, atol=1e-5, rtol=1e-4)
    wanted = torch.autograd.grad(sum(expected, torch.zeros(())), list(model.parameters()))
    got = torch.autograd.grad(found.loss, list(model.parameters()))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("mode", ["full", "topk", "sampled"])
def test_a_changed_teacher_changes_the_gradient(mode: Any):
    """Of the same rollouts, in every mode, and by much: `sampled` differentiated the wrong way has no teacher in it at all."""
    model = make_student()
    gradients = []
    texts = distil(model, mode).roll_out(PROMPT_ROWS, step=0)
    for seed in (1, 2):
        distillation = distil(model, mode, LocalTeacherModel(make_teacher(seed)))
        loss = output_of(model, distillation, texts).loss
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    apart = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert apart > 0.1


def test_the_sum_over_parts_is_the_whole():
    """Counts of the whole optimiser step divide every part, so no split changes the gradient."""
    model = make_student()
    distillation = distil(model, "topk")
    texts = distillation.roll_out(PROMPT_ROWS, step=0)
    num = NumItems(*(sum(label != IGN for t in texts for label in t.slots.labels[start::2]) for start in (2, 3)))
    whole = output_of(model, distillation, texts).loss
    parts = [output_of(model, distillation, [text], num).loss for text in texts]
    torch.testing.assert_close(sum(parts, torch.zeros(())), whole)


class Odd:
    """Right where the text has an odd number of characters; nothing can tell of an empty one."""

    def grade(self, question: Any, text: str) -> Grade:
        return Grade(len(text) % 2 == 1, error=None if text else "nothing to read")


def test_counts_are_of_what_was_written():
    model = make_student()
    row = OpdRow(messages=[{"role": "user", "content": "?"}], grader="odd")
    prompts = [Prompt(0, PROMPTS[0], row), Prompt(1, PROMPTS[1], row), Prompt(2, PROMPTS[2])]
    distillation = distil(model, "topk", graders={"odd": Odd()}, tokenizer=byte_tokenizer())
    texts = distillation.roll_out(prompts, step=0)
    counts = distillation.counts
    written = [sum(not pad for pad in text.slots.filler) - len(ids) for text, ids in zip(texts, PROMPTS, strict=True)]
    assert counts.num_tokens == sum(written)
    assert counts.num_pairs == sum(
        len(text.slots.ids) // 2 - (len(ids) + 1) // 2 for text, ids in zip(texts, PROMPTS, strict=True)
    )
    assert counts.num_tokens == counts.num_pairs + counts.num_committed
    assert counts.num_rejected
    assert counts.num_graded == 2
    metrics = counts.metrics()
    assert metrics["rollout_commit_rate"] == counts.num_committed / counts.num_pairs
    assert metrics["rollout_accuracy"] == counts.num_right / 2
    assert "rollout_accuracy" not in RolloutCounts(num_rollouts=1).metrics()
    assert RolloutCounts.of_tensor(counts.as_tensor()) == counts
    assert distillation.take_seconds()["rollout_s"] > 0
    assert distillation.take_seconds()["rollout_s"] == 0


def test_a_prompt_that_only_fills_a_batch_is_neither_learned_from_nor_counted():
    row = OpdRow(messages=[{"role": "user", "content": "?"}], grader="odd")
    prompts = [Prompt(0, PROMPTS[0], row), Prompt(1, PROMPTS[1], row).without_loss()]
    distillation = distil(make_student(), "topk", graders={"odd": Odd()}, tokenizer=byte_tokenizer())
    first, second = distillation.roll_out(prompts, step=0)
    assert any(label != IGN for label in first.slots.labels)
    assert all(label == IGN for label in second.slots.labels)
    assert (distillation.counts.num_rollouts, distillation.counts.num_graded) == (1, 1)


def test_graders_read_a_thinking_block_from_its_opening():
    """The template wrote `<think>`, the student the rest; a rollout whose prompt does not end so is read as it is."""
    tokenizer = byte_tokenizer()
    distillation = distil(make_student(), "topk", tokenizer=tokenizer, thinking_prefix="<think>\n")
    answer = [pair(token) for token in tokenizer.encode("so</think>7")]
    for prompt, text in (("7?<think>\n", "<think>\nso</think>7"), ("7?", "so</think>7")):
        found = rollout(tokenizer.encode(prompt), *answer, pair(258))
        assert distillation.text_of(found) == text
