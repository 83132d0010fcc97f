"""Decoding by kernels of our own: which layers take part, and that texts, training and errors are as without them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OlmoConfig

from families import PAD, VOCAB, base_model, pipo_model
from pipo import LLM, BaseForCausalLM, RequestOutput, SamplingParams
from pipo.engine.baselines import BaseRunner
from pipo.errors import ConfigError, KernelError
from pipo.kernels import cpu
from pipo.model.fused import fuse

PROMPTS = [[7], [5, 9, 3], list(range(3, 60)), [3 + (i * 7) % 150 for i in range(31)]]
FUSED = ["qwen3", "qwen3_tied", "qwen2", "llama"]


def texts(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def decode(llm: LLM, temperature: float = 0.0, n: int = 40) -> list[list[int]]:
    params = [
        SamplingParams(temperature=temperature, threshold=tau, max_tokens=n, ignore_eos=True, seed=row)
        for row, tau in enumerate((0.0, 0.5, 1.01, 0.5))
    ]
    return texts(llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], params))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call of a fused layer."""
    seen: list[int] = []
    run = cpu.LayerStack.__call__

    def counted(self: cpu.LayerStack, x: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(len(x))
        return run(self, x, *args)

    monkeypatch.setattr(cpu.LayerStack, "__call__", counted)
    return seen


@pytest.mark.parametrize("family", FUSED)
def test_layers_of_the_common_design_take_part(family: str, calls: list[int]) -> None:
    model = pipo_model(family)
    plain = decode(LLM(model))
    llm = LLM(model, kernels="native")
    assert llm.fusion is not None
    assert llm.fusion.stack is not None
    assert llm.fusion.layers == [*(f"layers.{i}" for i in range(4)), "mtp.layers.0"]
    calls.clear()
    assert decode(llm) == plain
    assert set(calls) == {1, 2, 3, 4} or max(calls) == 4
    assert decode(llm, temperature=1.0) == decode(LLM(pipo_model(family)), temperature=1.0)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen3_5", "linear"),
        ("gemma2", "its parts are"),
        ("mistral", "sliding"),
        ("granite", "another one"),
        ("qwen3_moe", "MLP"),
    ],
)
def test_other_layers_stay_as_they_are(family: str, reason: str) -> None:
    """Fails when a layer is taken for one of the common design that computes something else."""
    model = pipo_model(family)
    plain = decode(LLM(model))
    llm = LLM(model, kernels="native")
    assert llm.fusion is not None
    assert any(reason in why for why in llm.fusion.stock.values()), llm.fusion.stock
    assert decode(llm) == plain


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (OlmoConfig, "OlmoLayerNorm is no RMS norm"),
        (partial(LlamaConfig, hidden_act="gelu"), "its MLP's activation is not SiLU"),
    ],
)
def test_norms_and_activations_are_looked_at_by_themselves(config: Callable[..., Any], reason: str) -> None:
    """Fails when a part that a layer's output barely shows, or that has no weight, is taken for the common one."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    made = config(**sizes, num_attention_heads=4, pad_token_id=PAD, bos_token_id=1, eos_token_id=2)
    model = BaseForCausalLM(AutoModelForCausalLM.from_config(made).bfloat16(), mtp=False)
    llm = LLM(model, method="regular", kernels="auto")
    assert llm.fusion is not None
    assert len(llm.fusion.stock) == 2
    assert all(reason in why for why in llm.fusion.stock.values()), llm.fusion.stock


@pytest.mark.parametrize("method", ["regular", "mtp", "speculative"])
def test_the_baselines_decode_by_them_too(method: str, calls: list[int]) -> None:
    """Two new positions a row, where the method reads two."""
    model = base_model("llama")
    plain = decode(LLM(model, method=method))
    assert decode(LLM(model, method=method, kernels="native")) == plain
    assert calls


def test_bfloat16_logits_have_exact_sums() -> None:
    model = pipo_model("qwen3").bfloat16()
    fuse(model)
    hidden = torch.randn(5, 64).bfloat16()
    exact = hidden.double() @ model.lm_head.weight.double().T
    with torch.no_grad():
        got = model.sampling_logits(hidden)
    assert torch.allclose(got.double(), exact, rtol=1e-5, atol=1e-5)
    assert model.sampling_logits(hidden).requires_grad  # a gradient is not lost


def test_training_and_other_forwards_do_not_go_through_them(calls: list[int]) -> None:
    """Fails when a gradient is lost, or a forward without our cache takes the decode step's way."""
    model, other = pipo_model("qwen3"), pipo_model("qwen3")
    fuse(model)
    calls.clear()
    slots = torch.tensor([[5, 6, 7, PAD, 8, 9]])
    for each in (model, other):
        each(slots, labels=slots).loss.backward()
    assert not calls
    for (name, ours), (_, plain) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert (ours.grad is None) == (plain.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, plain.grad), name


def test_weights_may_change_in_place_or_be_replaced(calls: list[int]) -> None:
    """Fails when a step reads weights that are no longer the model's."""
    model, other = pipo_model("qwen3"), pipo_model("qwen3", seed=5)
    llm = LLM(model, kernels="native")
    model.load_state_dict(other.state_dict())
    assert decode(llm) == decode(LLM(other))
    calls.clear()
    layer = model.model.layers[1]  # its values: a factor of queries would vanish in their norm
    layer.self_attn.v_proj.weight = torch.nn.Parameter(layer.self_attn.v_proj.weight * -1.5)
    other.model.layers[1].self_attn.v_proj.weight.data *= -1.5
    assert decode(llm) == decode(LLM(other))


def test_undone_it_is_the_model_that_it_was(calls: list[int]) -> None:
    model = pipo_model("qwen3")
    plain = decode(LLM(model))
    LLM(model, kernels="native")
    calls.clear()
    assert LLM(model, kernels="torch").fusion is None
    assert decode(LLM(model)) == plain
    assert not calls
    assert "forward" not in model.model.layers[0].__dict__


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_it_is_not_copied_in_silence(family: str) -> None:
    """Fails when a copy goes on computing with the weights of the model that it was copied from."""
    model = pipo_model(family).bfloat16()
    fusion = fuse(model)
    with pytest.raises(KernelError, match="can't be copied"):
        copy.deepcopy(model)
    fusion.undo()
    copy.deepcopy(model)


def test_a_row_without_numbers_ends_alone() -> None:
    """Fails when a bad row spoils the others of its step."""
    model = base_model("qwen3")
    llm = LLM(model, method="regular", kernels="native")
    runner = llm.engine.runner
    assert isinstance(runner, BaseRunner)
    plain = decode(llm)
    model.model.embed_tokens.weight.data[VOCAB - 1] = torch.nan
    prompts = [{"prompt_token_ids": ids} for ids in [*PROMPTS, [VOCAB - 1]]]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    assert outputs[-1].error == "not_finite"
    assert texts(outputs[:-1]) == plain


def test_by_default_bfloat16_checkpoints_decode_by_them() -> None:
    assert LLM(pipo_model("qwen3").bfloat16(), kernels="auto").fusion is not None
    assert LLM(pipo_model("qwen3"), kernels="auto").fusion is None
    assert LLM(pipo_model("qwen3").bfloat16()).fusion is None  # in memory: others may be training it


def test_without_a_compiler_auto_says_so_and_native_refuses(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> None:
        raise KernelError("there is no compiler")

    monkeypatch.setattr("pipo.model.fused.load_library", missing)
    model = pipo_model("qwen3").bfloat16()
    with caplog.at_level(logging.WARNING, logger="pipo"):
        assert LLM(model, kernels="auto").fusion is None
    assert "there is no compiler" in caplog.text
    with pytest.raises(KernelError, match="no compiler"):
        LLM(model, kernels="native")
    with pytest.raises(ConfigError, match="auto, native or torch, got 'fast'"):
        LLM(model, kernels="fast")
