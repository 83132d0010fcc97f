"""`model.generate` decodes in pairs under Hugging Face's habits, and gives what the engine gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from families import EOS, PAD, base_model, pipo_model
from pipo import LLM, PipoForCausalLM, SamplingParams
from pipo.errors import ConfigError, RequestError

PROMPTS = [[7, 9, 11], [5], [3, 8, 21, 40, 77, 12]]


def left_padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", ["qwen3_5", "gemma2"])
@pytest.mark.parametrize("threshold", [0.0, 1.01])
def test_the_engine_gives_the_same(family: str, threshold: float) -> None:
    model = pipo_model(family)
    batch = left_padded(PROMPTS)
    out = model.generate(**batch, max_new_tokens=9, threshold=threshold, return_dict_in_generate=True, eos_token_id=-1)
    assert out.sequences.shape == (3, batch["input_ids"].shape[1] + 9)
    params = SamplingParams(temperature=0, threshold=threshold, max_tokens=9, ignore_eos=True)
    expected = LLM(model).generate([{"prompt_token_ids": p} for p in PROMPTS], params)
    assert out.sequences[:, -9:].tolist() == [e.token_ids for e in expected]
    assert out.num_pairs.tolist() == [e.num_pairs for e in expected]
    assert out.num_committed.tolist() == [e.num_committed for e in expected]


def test_end_of_text_ends_a_row_and_pads_it() -> None:
    model = pipo_model("qwen3")
    ids = torch.tensor([[7, 9, 11]])
    free = model.generate(ids, max_new_tokens=12, eos_token_id=-1)[0, 3:].tolist()
    stop = free[4]
    cut = model.generate(ids.repeat(2, 1), max_new_tokens=12, eos_token_id=[stop, EOS])
    assert cut[0, 3:].tolist() == free[: free.index(stop) + 1]


def test_seeds_and_samples() -> None:
    model = pipo_model("qwen3")
    options: dict[str, Any] = {"do_sample": True, "top_k": 50, "max_new_tokens": 8, "num_return_sequences": 3}
    torch.manual_seed(1)
    first = model.generate(torch.tensor([[7, 9]]), **options)
    torch.manual_seed(1)
    again = model.generate(torch.tensor([[7, 9]]), **options)
    assert first.shape[0] == 3
    assert torch.equal(first, again)
    assert len({tuple(row) for row in first.tolist()}) == 3


def test_a_streamer_gets_pairs() -> None:
    class Streamer:
        def __init__(self) -> None:
            self.got: list[list[int]] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.got.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    out = pipo_model("qwen3").generate(
        torch.tensor([[7, 9]]), max_new_tokens=7, threshold=0.0, eos_token_id=-1, streamer=streamer
    )
    assert [len(g) for g in streamer.got] == [2, 2, 2, 2, 1]
    assert [t for g in streamer.got for t in g] == out[0].tolist()
    assert streamer.ended


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"stop_strings": ["a"]}, "stop_strings"),
        ({"max_length": 2}, "nothing to generate"),
        ({"do_sample": True, "temperature": 0.0}, "temperature"),
    ],
)
def test_options_without_meaning_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pipo_model("qwen3").generate(torch.tensor([[7, 9]]), **options)


def test_an_empty_row_is_refused() -> None:
    with pytest.raises(RequestError, match=r"\[1\]"):
        pipo_model("qwen3").generate(torch.tensor([[7], [0]]), attention_mask=torch.tensor([[1], [0]]))


def test_the_checkpoints_defaults_are_taken(tmp_path: Path) -> None:
    base = base_model("qwen3")
    base.save_pretrained(tmp_path / "base")
    GenerationConfig(do_sample=True, top_k=20, max_new_tokens=6, eos_token_id=[EOS]).save_pretrained(tmp_path / "base")
    PipoForCausalLM.from_base(tmp_path / "base").save_pretrained(tmp_path / "pipo")
    model = PipoForCausalLM.from_pretrained(tmp_path / "pipo")
    ids = torch.tensor([[7, 9]])
    drawn = {tuple(model.generate(ids, eos_token_id=-1)[0].tolist()) for _ in range(4)}
    assert len(drawn) > 1
    assert all(len(row) == 2 + 6 for row in drawn)
    greedy = {tuple(model.generate(ids, do_sample=False, eos_token_id=-1)[0].tolist()) for _ in range(2)}
    assert len(greedy) == 1


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "granite"])
def test_what_is_drawn_from_is_float32_also_in_bfloat16(family: str) -> None:
    """Fails when logits are rounded to bfloat16 on their way to softmax and log-probabilities."""
    model = pipo_model(family).to(torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
        hidden = torch.randn(3, 64).to(torch.bfloat16)
        exact = model.backbone.scale_logits(hidden.double() @ model.lm_head.weight.double().T)
        drawn_from, rounded = model.sampling_logits(hidden), model.head(hidden)
    top = exact.topk(64).indices  # at the 128th, roundings decide who is in
    error = (drawn_from.double() - exact).gather(1, top).abs().max()
    assert drawn_from.dtype == torch.float32
    assert error < 1e-4
    assert (rounded.double() - exact).abs().max() > 100 * error
