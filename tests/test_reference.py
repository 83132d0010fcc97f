"""The executable specification itself: hand-computed losses, gradients, and generation against the golden traces."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from pipo import reference
from pipo.errors import ConfigError
from pipo.model.modeling import PipoForCausalLM
from pipo.pairing import IGNORE_INDEX, Slots, accept
from pipo.reference import confidence_target, divergence, opd_losses, sft_losses

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / "golden"
TRACES = json.loads((GOLDEN / "traces.json").read_text())
NAMES = sorted(TRACES)
MODES = ["full", "topk", "sampled"]
IGN = IGNORE_INDEX


@pytest.fixture(scope="module")
def models():
    return {name: PipoForCausalLM.from_pretrained(GOLDEN / name).eval() for name in NAMES}


# --- generation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_generation_reproduces_the_golden_traces(models, name):
    """Same tokens wherever the margin is above float32 noise, the same margin, and the same verdicts of the gate."""
    for trace in TRACES[name]:
        length = len(trace["token_ids"])
        made = reference.generate(models[name], trace["prompt"], max_tokens=length, threshold=trace["threshold"])
        assert made.margin == pytest.approx(trace["margin"], abs=5e-5)
        if trace["margin"] > 2e-3:
            assert made.token_ids == trace["token_ids"]
            # The traces count a draft that max_tokens cut off; section 3.3 counts visible text.
            last = made.pairs[-1]
            passed = last.confidence is not None and accept(last.confidence, trace["threshold"])
            assert made.num_committed + (passed and not last.committed) == trace["committed"]
        assert len(made.token_ids) == len(made.pairs) + made.num_committed


def test_generation_stops_where_told(models):
    """The stop token is part of the ids; a draft behind it, or beyond max_tokens or the context, is not."""
    model, prompt = models["tiny-mlp-tied"], [130, 60, 253, 230, 241]
    free = reference.generate(model, prompt, max_tokens=8, threshold=0.0)
    token1, draft = free.token_ids[2:4]
    at_first = reference.generate(model, prompt, max_tokens=8, threshold=0.0, stop_ids=[token1])
    assert (at_first.token_ids, at_first.finish_reason) == (free.token_ids[:3], "stop")
    assert not at_first.pairs[-1].committed
    at_second = reference.generate(model, prompt, max_tokens=8, threshold=0.0, stop_ids=[draft])
    assert (at_second.token_ids, at_second.finish_reason) == (free.token_ids[:4], "stop")
    odd = reference.generate(model, prompt, max_tokens=3, threshold=0.0)
    assert (odd.token_ids, odd.finish_reason, odd.num_committed) == (free.token_ids[:3], "length", 1)
    full = reference.generate(model, prompt, max_tokens=8, threshold=0.0, max_pairs=5)
    assert (full.token_ids, full.finish_reason) == (free.token_ids[:4], "length")


def test_a_gate_above_1_never_runs_the_mtp_block(models, monkeypatch):
    model = models["tiny-mlp-tied"]
    monkeypatch.setattr(model, "run_mtp", None)
    made = reference.generate(model, [1, 2, 3], max_tokens=3, threshold=1.01)
    assert [pair.draft for pair in made.pairs] == [None] * 3


def test_the_caller_s_choice_of_tokens_is_asked_for_each(models):
    asked = []

    def pick(logits_V, tokens, step, slot):
        asked.append((list(tokens), step, slot))
        return 10 * step + slot

    made = reference.generate(models["tiny-mlp-tied"], [1, 2], max_tokens=4, threshold=0.0, pick=pick)
    assert made.token_ids == [0, 1, 10, 11]
    assert asked == [([], 0, 0), ([0], 0, 1), ([0, 1], 1, 0), ([0, 1, 10], 1, 1)]


# --- supervised losses ------------------------------------------------------------------------------------


def test_sft_losses_by_hand():
    """Two tokens, probabilities 1/4 and 3/4: step 0 predicts slots 2 and 3, step 1 slots 4 and 5."""
    even, skewed = [0.0, 0.0], [0.0, math.log(3)]
    logits1 = torch.tensor([skewed, even, [9.0, -9.0]])
    logits2 = torch.tensor([skewed, even])
    confidence = torch.tensor([math.log(3), 0.0])  # c = 3/4 and 1/2
    losses = sft_losses(logits1, logits2, confidence, [IGN, IGN, 0, 1, 1, IGN])
    assert losses.backbone.item() == pytest.approx((math.log(4) + math.log(2)) / 2)
    assert losses.mtp.item() == pytest.approx(-math.log(0.75))
    assert losses.confidence.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    expected = losses.backbone + 0.5 * losses.mtp + 2 * losses.confidence
    assert losses.total(0.5, 2.0).item() == pytest.approx(expected.item())


def test_sft_losses_equal_those_of_torch_in_value_and_gradient():
    torch.manual_seed(0)
    logits1, logits2 = torch.randn(6, 9), torch.randn(5, 9)
    confidence = torch.randn(5)
    labels = torch.tensor([IGN, IGN, IGN, 3, 4, IGN, 0, 8, 7, 2, 1, IGN])
    leaves = [[t.clone().requires_grad_() for t in (logits1, logits2, confidence)] for _ in range(2)]
    naive = sft_losses(*leaves[0], labels.tolist())
    ce1 = F.cross_entropy(leaves[1][0][:-1], labels[2::2], ignore_index=IGN)
    ce2 = F.cross_entropy(leaves[1][1], labels[3::2], ignore_index=IGN)
    kept = labels[3::2] != IGN
    target = leaves[1][1].detach().softmax(-1)[kept, labels[3::2][kept]]
    bce = F.binary_cross_entropy_with_logits(leaves[1][2][kept], target)
    for found, expected in zip(naive, (ce1, ce2, bce), strict=True):
        torch.testing.assert_close(found, expected)
    naive.total().backward()
    (ce1 + ce2 + bce).backward()
    for found, expected in zip(*leaves, strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_the_confidence_loss_moves_only_the_confidence():
    """Its target is the draft's probability: with a gradient, the model would learn to be easy to judge."""
    logits1, logits2 = torch.randn(2, 4), torch.randn(1, 4, requires_grad=True)
    confidence = torch.zeros(1, requires_grad=True)
    sft_losses(logits1, logits2, confidence, [0, 1, 2, 3]).confidence.backward()
    assert logits2.grad is None or not logits2.grad.any()
    assert confidence.grad.any()


def test_without_labels_the_losses_are_zero_with_a_gradient():
    """A rank whose rows are all prompt must still take part in the backward pass."""
    logits1, logits2 = torch.randn(2, 4, requires_grad=True), torch.randn(1, 4)
    losses = sft_losses(logits1, logits2, torch.zeros(1), [IGN] * 4)
    assert [loss.item() for loss in losses] == [0, 0, 0]
    losses.total().backward()
    assert not logits1.grad.any()


def test_extreme_confidences_give_finite_losses():
    for logit in (-200.0, 200.0):
        for target in (0.0, 0.3, 1.0):
            logit_t, target_t = torch.tensor(logit), torch.tensor(target)
            found = reference.binary_cross_entropy(logit_t, target_t)
            torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(logit_t, target_t))


# --- distillation -----------------------------------------------------------------------------------------


def test_divergences_by_hand():
    """Student (1/2, 1/2), teacher (1/4, 3/4)."""
    student, teacher = torch.tensor([0.0, 0.0]), torch.tensor([0.0, math.log(3)])
    reverse = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    forward = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert divergence(student, teacher, 0, "full").item() == pytest.approx(reverse)
    assert divergence(student, teacher, 0, "full", beta=0.0).item() == pytest.approx(forward)
    m = [0.75 * 0.5 + 0.25 * 0.25, 0.75 * 0.5 + 0.25 * 0.75]  # β = 1/4
    mixed = 0.25 * (0.25 * math.log(0.25 / m[0]) + 0.75 * math.log(0.75 / m[1]))
    mixed += 0.75 * (0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1]))
    assert divergence(student, teacher, 0, "full", beta=0.25).item() == pytest.approx(mixed)
    assert confidence_target(student, teacher, 1, "full").item() == pytest.approx(0.75)
    assert confidence_target(student, teacher, 0, "topk").item() == pytest.approx(0.5)
    assert confidence_target(student, teacher, 1, "sampled").item() == 1.0


def test_topk_renormalises_over_both_sides_best_tokens_and_the_label():
    student = torch.tensor([3.0, 2.0, 0.0, -1.0, -2.0])
    teacher = torch.tensor([-2.0, 2.0, 5.0, -1.0, -1.0])
    kept = [0, 2, 4]  # the student's best, the teacher's best, the label
    expected = divergence(student[kept], teacher[kept], 0, "full")
    torch.testing.assert_close(divergence(student, teacher, 4, "topk", top_k=1), expected)
    everything = divergence(student, teacher, 4, "topk", top_k=99)
    torch.testing.assert_close(everything, divergence(student, teacher, 4, "full"))
    # The confidence target still comes from all of the vocabulary.
    log_ratio = teacher.log_softmax(-1)[0] - student.log_softmax(-1)[0]
    assert confidence_target(student, teacher, 0, "topk").item() == pytest.approx(min(1.0, log_ratio.exp().item()))


def test_sampled_has_the_gradient_of_the_reverse_kl_on_average():
    """The mean over y ~ p_s, and with importance ratios the mean over y from another distribution."""
    torch.manual_seed(1)
    student, teacher, other = torch.randn(3, 6, dtype=torch.float64)
    student.requires_grad_()
    (expected,) = torch.autograd.grad(divergence(student, teacher, 0, "full"), student)
    p_student, p_other = student.detach().softmax(-1), other.softmax(-1)
    for drawn_from in (p_student, p_other):
        average = torch.zeros(6, dtype=torch.float64)
        for y in range(6):
            ratio = (p_student[y] / drawn_from[y]).item()
            surrogate = divergence(student, teacher, y, "sampled", ratio=ratio)
            average += drawn_from[y] * torch.autograd.grad(surrogate, student)[0]
        torch.testing.assert_close(average, expected)


@pytest.mark.parametrize(
    ("mode", "beta"), [("full", 1.0), ("full", 0.5), ("full", 0.0), ("topk", 1.0), ("topk", 0.5), ("sampled", 1.0)]
)
def test_a_changed_teacher_changes_the_gradient_and_gets_none(mode, beta):
    """The public code's "sampled" had no teacher in its gradient at all."""
    torch.manual_seed(2)
    student = torch.randn(40, requires_grad=True)
    gradients = []
    for _ in range(2):
        teacher = torch.randn(40, requires_grad=True)
        divergence(student, teacher, 7, mode, top_k=4, beta=beta).backward()
        gradients.append(student.grad.clone())
        student.grad = None
        assert teacher.grad is None
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(mode):
    student = torch.randn(8, requires_grad=True)
    divergence(student, student.detach(), 3, mode).backward()
    assert student.grad.abs().max() < 1e-6
    assert confidence_target(student, student, 3, mode).item() == pytest.approx(1.0)


def test_small_beta_and_large_beta_come_near_the_ends():
    """The mixture itself vanishes at both ends, in proportion to β and 1 − β; that is why they are defined apart."""
    torch.manual_seed(3)
    student, teacher = torch.randn(2, 6, dtype=torch.float64)
    near_0 = divergence(student, teacher, 0, "full", beta=1e-4) / 1e-4
    near_1 = divergence(student, teacher, 0, "full", beta=1 - 1e-4) / 1e-4
    torch.testing.assert_close(near_0, divergence(student, teacher, 0, "full", beta=0.0), rtol=1e-3, atol=0)
    torch.testing.assert_close(near_1, divergence(student, teacher, 0, "full", beta=1.0), rtol=1e-3, atol=0)


def test_settings_that_mean_nothing_are_refused():
    student = torch.zeros(3)
    with pytest.raises(ConfigError, match=r"beta = 0\.5"):
        divergence(student, student, 0, "sampled", beta=0.5)
    with pytest.raises(ConfigError, match=r"\[0, 1\], got 1\.5"):
        divergence(student, student, 0, "full", beta=1.5)


def rollout():
    """Prompt (5, PAD), then pairs (1, 2), (3, PAD: draft 4 rejected), (5, 0): fillers at slots 1 and 5."""
    return Slots(
        [5, 9, 1, 2, 3, 9, 5, 0], [IGN, IGN, 1, 2, 3, 4, 5, 0], [False, True] + [False] * 3 + [True] + [False] * 2
    )


@pytest.mark.parametrize("mode", MODES)
def test_each_step_is_compared_with_the_teacher_after_the_same_tokens(mode):
    """Teacher tokens are 5 1 2 3 5 0: backbone steps read it after tokens 0, 2, 3 of them and MTP steps after 1, 3, 4."""
    torch.manual_seed(4)
    logits1, logits2, confidence, teacher = torch.randn(4, 10), torch.randn(3, 10), torch.randn(3), torch.randn(6, 10)
    losses = opd_losses(logits1, logits2, confidence, teacher, rollout(), mode, top_k=3)
    first = [divergence(logits1[i], teacher[n], y, mode, 3) for i, (n, y) in enumerate([(0, 1), (2, 3), (3, 5)])]
    # Step 1's label is the rejected draft, 4.
    steps = list(enumerate([(1, 2), (3, 4), (4, 0)]))
    second = [divergence(logits2[i], teacher[n], y, mode, 3) for i, (n, y) in steps]
    gate = [
        F.binary_cross_entropy_with_logits(confidence[i], confidence_target(logits2[i], teacher[n], y, mode))
        for i, (n, y) in steps
    ]
    for found, expected in zip(losses, (first, second, gate), strict=True):
        torch.testing.assert_close(found, torch.stack(expected).mean())


@pytest.mark.parametrize("mode", MODES)
def test_a_changed_teacher_changes_every_gradient_of_distillation(mode):
    torch.manual_seed(5)
    leaves = [torch.randn(*shape, requires_grad=True) for shape in ((4, 10), (3, 10), (3,))]
    gradients = []
    for _ in range(2):
        losses = opd_losses(*leaves, torch.randn(6, 10), rollout(), mode, top_k=3)
        gradients.append(torch.autograd.grad(losses.total(), leaves))
    for first, second in zip(*gradients, strict=True):
        assert (first - second).abs().max() > 1e-4


def test_an_unlabelled_filler_teaches_nothing():
    """The prompt's own PAD and the tail's have no label: only a rejected draft's slot does."""
    slots = rollout()
    unlabelled = Slots(
        slots.ids, [IGN if pad else label for label, pad in zip(slots.labels, slots.filler, strict=True)], slots.filler
    )
    logits2, confidence = torch.randn(3, 10, requires_grad=True), torch.randn(3, requires_grad=True)
    opd_losses(torch.randn(4, 10), logits2, confidence, torch.randn(6, 10), unlabelled, "full").total().backward()
    assert not logits2.grad[1].any()
    assert not confidence.grad[1]
    assert logits2.grad[0].any()
