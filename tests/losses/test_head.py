"""A model's own output map: the same logits as its head, whatever the family; gradients of a tied head; heads refused."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from families import VOCAB, base_model, pipo_model
from loss_cases import make_case
from pipo.errors import ConfigError, UnsupportedModelError
from pipo.losses import FullTeacher, LogitScale, OutputMap, divergence_loss

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_tied", "gemma2", "granite", "cohere2"])
def test_logits_are_those_of_the_model_s_head(family):
    """Breaks when a family's scale or cap is applied in one of the two places only."""
    model = pipo_model(family)
    hidden = torch.randn(3, model.config.hidden_size, generator=torch.Generator().manual_seed(0)) * 5
    found = model.output_map().logits(hidden)
    torch.testing.assert_close(found, model.head(hidden).detach(), rtol=1e-5, atol=1e-5)
    assert model.output_map().weight is model.lm_head.weight


@pytest.mark.parametrize("mode", ["full", "topk", "sampled"])
def test_a_tied_head_adds_up_both_its_gradients(mode):
    """The weight is embedding and head at once. Breaks when one use overwrites the other, or is lost."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(12, 4, generator=generator).requires_grad_()
    teacher = FullTeacher(torch.randn(5, 12, generator=generator).log_softmax(-1))
    ids, labels = torch.randint(0, 12, (2, 5), generator=generator)

    def gradient(embedding: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(embedding[ids])
        loss = divergence_loss(mode, hidden, OutputMap(head), labels, teacher, k=3).mean
        (found,) = torch.autograd.grad(loss, table)
        return found

    both, first, second = gradient(table, table), gradient(table, table.detach()), gradient(table.detach(), table)
    assert first.any()
    assert second.any()
    torch.testing.assert_close(both, first + second)


def test_a_tied_model_trains_one_matrix():
    model = pipo_model("qwen3_tied")
    ids = torch.randint(1, VOCAB, (1, 12), generator=torch.Generator().manual_seed(0))
    model(ids, labels=ids).loss.backward()
    through_both = model.lm_head.weight.grad.clone()
    model.zero_grad()
    plain = model(ids, return_logits=True)
    loss = model(ids, labels=ids).confidence_loss
    for logits, labels in ((plain.logits[0, :-1], ids[0, 2::2]), (plain.mtp_logits[0], ids[0, 3::2])):
        loss = loss + nn.functional.cross_entropy(logits, labels)
    loss.backward()
    scale = float(through_both.abs().max())
    torch.testing.assert_close(through_both, model.lm_head.weight.grad, rtol=0, atol=1e-5 * scale)


class _Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_heads_that_are_more_than_a_matrix_are_refused():
    """Reading such a head's weight would train against other logits than it gives."""
    model = base_model("qwen3")
    model.lm_head = _Doubled(64, VOCAB)
    with pytest.raises(UnsupportedModelError, match=r"plain linear head.*_Doubled"):
        model.output_map()
    model = base_model("qwen3")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"]), model)
    with pytest.raises(UnsupportedModelError, match=r"plain linear head.*leave the head out of the adapter"):
        model.output_map()


def test_a_sharded_head_is_refused():
    model = base_model("qwen3")
    model.lm_head.weight.device_mesh = "of two"
    with pytest.raises(UnsupportedModelError, match=r"whole weight.*sharded"):
        model.output_map()


@pytest.mark.parametrize(("weight", "bias"), [((3,), None), ((3, 2), (2,)), ((2, 3, 4), None)])
def test_shapes_that_are_no_head_s(weight, bias):
    with pytest.raises(ConfigError, match=r"weight \[V, H\] and a bias \[V\]"):
        OutputMap(torch.zeros(weight), None if bias is None else torch.zeros(bias))


@cuda
@pytest.mark.parametrize("mode", ["full", "topk", "sampled"])
@pytest.mark.parametrize("train_head", [True, False])
def test_bfloat16_products_on_a_gpu(mode, train_head):
    """bf16 operands, float32 sums: values as from float64; gradients round their logits' to bf16 once more."""
    case = make_case(
        num=32, width=64, vocab=1000, dtype=torch.bfloat16, scale=LogitScale(cap=8.0), train_head=train_head
    )
    exact = case.exact()
    wanted = divergence_loss(mode, exact.hidden, exact.head, exact.labels, exact.local).mean
    for name, value in vars(case).items():
        if isinstance(value, torch.Tensor):
            setattr(case, name, value.detach().cuda().requires_grad_(value.requires_grad))
    found = divergence_loss(mode, case.hidden, case.head, case.labels, case.local).mean
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-5, atol=1e-5)
    grads = zip(torch.autograd.grad(found, case.leaves), torch.autograd.grad(wanted, exact.leaves), strict=True)
    for one, other in grads:
        torch.testing.assert_close(one.cpu().double(), other, rtol=0, atol=2**-7 * float(other.abs().max()))
