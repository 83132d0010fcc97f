"""Weights in huge pages: moved, never changed, and shared as before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from families import pipo_model
from pipo import LLM
from pipo.kernels import pages


def test_weights_are_moved_and_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a weight is changed, mixed up with its neighbour, or no longer shared by what is tied."""
    monkeypatch.setattr(pages, "advise", lambda tensor: True)
    model = pipo_model("qwen3_tied")
    model.wide = nn.Parameter(torch.randn(1024, 1024))
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    total = pages.gather(model.parameters())
    assert total >= sum(tensor.nbytes for _, tensor in before.values())
    for name, parameter in model.named_parameters():
        identity, tensor = before[name]
        assert id(parameter) == identity
        assert torch.equal(parameter, tensor)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(storages) == 1
    assert all(p.data_ptr() % pages.ALIGNMENT == 0 for p in model.parameters())


def test_without_huge_pages_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "advise", lambda tensor: False)
    weight = nn.Parameter(torch.randn(1024, 1024))
    place = weight.data_ptr()
    assert pages.gather([weight]) == 0
    assert weight.data_ptr() == place


def test_weights_of_a_model_in_memory_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever shares them, such as a process that trains it, would be left with others."""
    monkeypatch.setattr("pipo.model.fused.gather", lambda parameters: pytest.fail("moved"))
    LLM(pipo_model("qwen3"), kernels="native")


def test_zeros_are_zeros() -> None:
    made = pages.zeros(3, 700_001, like=torch.ones(1))
    assert made.shape == (3, 700_001)
    assert not made.any()
