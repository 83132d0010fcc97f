"""The same code on a GPU. Skipped where there is none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from families import FAMILIES, base_model, pipo_model
from pipo import LLM, SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_writes_what_the_cpu_writes(family: str) -> None:
    model = pipo_model(family)
    prompts = [{"prompt_token_ids": list(range(3, 4 + 5 * i))} for i in range(4)]
    params = SamplingParams(temperature=0, threshold=0.0, max_tokens=12, ignore_eos=True)
    on_cpu = LLM(model).generate(prompts, params)
    on_gpu = LLM(copy.deepcopy(model).to("cuda")).generate(prompts, params)
    # Float noise may flip a near-tie, after which texts differ: most must agree throughout, all at the start.
    agree = [a.token_ids == b.token_ids for a, b in zip(on_cpu, on_gpu, strict=True)]
    assert sum(agree) >= 3
    assert all(a.token_ids[0] == b.token_ids[0] for a, b in zip(on_cpu, on_gpu, strict=True))


def mixed() -> list[SamplingParams]:
    settings: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 1, "top_k": 20, "threshold": 0.5},
        {"temperature": 0.8, "seed": 2, "top_p": 0.9, "threshold": 0.4},
        {"temperature": 1.0, "seed": 3, "min_p": 0.1, "threshold": 1.01},
    ]
    return [SamplingParams(**{"threshold": 0.0, "max_tokens": 24, "ignore_eos": True, **s}) for s in settings]


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_steps_write_what_steps_write(family: str) -> None:
    model = pipo_model(family).to("cuda")
    prompts = [{"prompt_token_ids": list(range(3, 4 + 5 * i))} for i in range(4)]
    plain = LLM(model, cuda_graphs=False).generate(prompts, mixed())
    captured = LLM(model, cuda_graphs=True).generate(prompts, mixed())
    # Attention sums in another order, so a near-tie may flip: most must agree throughout.
    assert sum(a.token_ids == b.token_ids for a, b in zip(plain, captured, strict=True)) >= 3


@pytest.mark.parametrize("method", ["regular", "mtp"])
def test_captured_baselines_write_what_they_write(method: str) -> None:
    model = base_model("qwen3").to("cuda")
    prompts = [{"prompt_token_ids": list(range(3, 4 + 5 * i))} for i in range(4)]
    plain = LLM(model, method=method, cuda_graphs=False).generate(prompts, mixed())
    captured = LLM(model, method=method, cuda_graphs=True).generate(prompts, mixed())
    assert sum(a.token_ids == b.token_ids for a, b in zip(plain, captured, strict=True)) >= 3


def test_steps_do_not_wait_for_the_device() -> None:
    """But for the event that says a result has arrived, which torch does not count."""
    llm = LLM(pipo_model("qwen3").to("cuda"), cuda_graphs=True)
    asked = SamplingParams(temperature=0, threshold=0.0, max_tokens=60, ignore_eos=True)
    llm.engine.add(llm.prepare({"prompt_token_ids": [3, 4, 5]}, asked))
    for _ in range(4):  # prefill, capture, first replays
        llm.engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            llm.engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    llm.engine.abort(llm.engine.running[0].request_id)
