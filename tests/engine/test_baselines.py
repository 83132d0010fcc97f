"""The baselines on base checkpoints: regular equals Hugging Face's own generate, speculative is lossless, MTP is what it says."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import EOS, VOCAB, base_model, config_of
from pipo import LLM, BaseForCausalLM, PipoForCausalLM, SamplingParams
from pipo.engine import baselines
from pipo.errors import CheckpointError, ConfigError, RequestError

PROMPTS = [[7], [5, 9, 40], list(range(3, 40)), [3 + (i * 7) % 150 for i in range(20)]]
# Dense, hybrid, hybrid MoE, sliding windows with soft caps, sliding everywhere.
FAMILIES = ["qwen3", "qwen3_5", "qwen3_next", "gemma2", "mistral", "granite"]


def prompts() -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": p} for p in PROMPTS]


def greedy(**changes: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, **changes)


# A few likely tokens and flat logits: the MTP block then agrees with the backbone often, but not always.
BIAS = {10: 6.0, 11: 6.2, 12: 6.4, 13: 6.6, 14: 6.8}


def agreeable_model(family: str) -> BaseForCausalLM:
    model = base_model(family)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.05)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_regular_decoding_is_hugging_faces_own(family: str, tmp_path: Path) -> None:
    model = base_model(family)
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    outputs = LLM(model, method="regular").generate(prompts(), greedy())
    for ids, output in zip(PROMPTS, outputs, strict=True):
        expected = stock.generate(
            torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        assert output.token_ids == expected[0, len(ids) :].tolist()
        assert (output.num_pairs, output.num_committed) == (24, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_speculation_writes_what_regular_decoding_writes(family: str) -> None:
    """Fails when a rejected draft leaves a trace in keys, values or linear-attention states."""
    model = agreeable_model(family)
    settings = greedy(logit_bias=dict.fromkeys(BIAS, 20.0))
    regular = LLM(model, method="regular").generate(prompts(), settings)
    speculative = LLM(model, method="speculative", max_num_seqs=3).generate(prompts(), settings)
    assert [o.token_ids for o in speculative] == [o.token_ids for o in regular]
    assert sum(o.num_rejected for o in speculative) > 5
    assert sum(o.num_committed for o in speculative) > 2
    for output in speculative:
        assert output.num_pairs + output.num_committed in (24, 25)  # the last step may be cut


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_speculation_samples_from_the_base_model(family: str) -> None:
    """Chi-square of the joint distribution of three tokens against the model's own, filters and penalties included."""
    model = agreeable_model(family)
    settings: dict[str, Any] = {
        "temperature": 0.9,
        "top_k": 5,
        "logit_bias": BIAS,
        "presence_penalty": 0.5,
        "max_tokens": 3,
        "ignore_eos": True,
    }
    num = 2500
    counts = {}
    for method in ("regular", "speculative"):
        llm = LLM(model, method=method, max_num_seqs=num, seed=1 if method == "regular" else 2)
        outputs = llm.generate({"prompt_token_ids": [5, 9, 40]}, SamplingParams(n=num, **settings))
        if method == "speculative":
            assert 0.1 * num < sum(o.num_committed for o in outputs) < 0.98 * num
            assert sum(o.num_rejected for o in outputs) > 0.02 * num
        table: dict[tuple[int, ...], int] = {}
        for output in outputs:
            table[tuple(output.token_ids)] = table.get(tuple(output.token_ids), 0) + 1
        counts[method] = table
    statistic, cells = 0.0, 0
    for key in set(counts["regular"]) | set(counts["speculative"]):
        a, b = counts["regular"].get(key, 0), counts["speculative"].get(key, 0)
        if a + b >= 10:
            statistic += (a - b) ** 2 / (a + b)
            cells += 1
    assert cells > 10
    assert statistic < cells + 5 * (2 * cells) ** 0.5


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next"])
def test_what_is_left_of_a_rejected_draft_is_right_while_rows_come_and_go(family: str) -> None:
    """Fails when reading a good token again loses what another, short row has just written: its later tokens are then another text's."""
    model = base_model(family)
    params = SamplingParams(temperature=0.7, max_tokens=12, ignore_eos=True, n=2, seed=4, logprobs=1)
    for output in LLM(model, method="speculative", max_num_seqs=2).generate(prompts(), params):
        ids = output.prompt_token_ids + output.token_ids
        with torch.no_grad():
            log_probs = model(torch.tensor([ids]), return_logits=True).logits[0].log_softmax(-1)
        for step, (token, found) in enumerate(zip(output.token_ids, output.logprobs or [], strict=True)):
            assert found.logprob == pytest.approx(
                float(log_probs[len(output.prompt_token_ids) - 1 + step, token]), abs=1e-3
            )


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5", "mistral"])
def test_mtp_without_verification_keeps_every_draft(family: str) -> None:
    """Token 1 is the backbone's after all text so far; token 2 is the MTP block's, unverified."""
    model = base_model(family)
    outputs = LLM(model, method="mtp").generate(prompts(), greedy())
    for ids, output in zip(PROMPTS, outputs, strict=True):
        assert (output.num_pairs, output.num_committed, output.num_rejected) == (12, 12, 0)
        with torch.no_grad():
            full = model(torch.tensor([ids + output.token_ids]), return_logits=True)
        for step in range(12):
            position = len(ids) - 1 + 2 * step
            for logits, token in (
                (full.logits[0, position], output.token_ids[2 * step]),
                (full.mtp_logits[0, position], output.token_ids[2 * step + 1]),
            ):
                best, second = logits.topk(2).values.tolist()
                assert int(logits.argmax()) == token or best - second < 2e-3


@pytest.mark.parametrize("method", ["regular", "mtp", "speculative"])
def test_stops_limits_and_logprobs(method: str) -> None:
    model = base_model("qwen3_5")
    llm = LLM(model, method=method)
    output = llm.generate({"prompt_token_ids": [5]}, SamplingParams(temperature=0, logit_bias={EOS: 100.0}))[0]
    assert (output.token_ids, output.finish_reason) == ([EOS], "stop")
    held = SamplingParams(temperature=0, logit_bias={EOS: 100.0}, min_tokens=5, logprobs=2)
    output = llm.generate({"prompt_token_ids": [5]}, held)[0]
    assert output.token_ids.index(EOS) == 5
    assert output.logprobs is not None
    assert [entry.token_id for entry in output.logprobs] == output.token_ids
    small = LLM(model, method=method, max_model_len=20)
    output = small.generate({"prompt_token_ids": [5] * 11}, SamplingParams(temperature=0, ignore_eos=True))[0]
    assert output.finish_reason == "length"
    assert 8 <= len(output.token_ids) <= 9
    with pytest.raises(RequestError, match="record_pairs"):
        llm.generate({"prompt_token_ids": [5]}, SamplingParams(record_pairs=True))


@pytest.mark.parametrize("method", ["regular", "mtp", "speculative"])
def test_preempted_baselines_go_on(method: str) -> None:
    model = base_model("qwen3_5")
    roomy = LLM(model, method=method)
    free = roomy.generate(prompts(), greedy())
    budget = roomy.engine.budget
    tight = LLM(model, method=method, cache_budget_bytes=2 * (budget.row_bytes + 45 * budget.position_bytes))
    assert [o.token_ids for o in tight.generate(prompts(), greedy())] == [o.token_ids for o in free]


def test_baselines_and_checkpoints_must_fit(tmp_path: Path) -> None:
    base = base_model("qwen3")
    base.save_pretrained(tmp_path / "base")
    PipoForCausalLM.from_base(tmp_path / "base").save_pretrained(tmp_path / "pipo")
    with pytest.raises(CheckpointError, match="expects latents"):
        LLM(tmp_path / "pipo", method="regular")
    with pytest.raises(CheckpointError, match="pipo init"):
        LLM(tmp_path / "base")
    bare = BaseForCausalLM.from_config(config_of("qwen3"), mtp=False)
    assert LLM(bare, method="regular").generate({"prompt_token_ids": [5]}, greedy())[0].num_tokens == 24
    with pytest.raises(ConfigError, match=r"no mtp\.\* tensors"):
        LLM(bare, method="speculative")
    assert LLM(tmp_path / "base", method="mtp", device="cpu").vocab_size == VOCAB


@pytest.mark.parametrize("method", ["regular", "mtp", "speculative"])
def test_a_step_cut_off_midway_costs_nobody_a_token(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = agreeable_model("qwen3_5")
    settings = greedy(logit_bias=dict.fromkeys(BIAS, 20.0))
    expected = [o.token_ids for o in LLM(model, method=method).generate(prompts(), settings)]
    original, calls = baselines.fetch, []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) in (2, 9):
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(baselines, "fetch", interrupted)
    llm = LLM(model, method=method)
    samples = [llm.prepare(p, settings)[0] for p in prompts()]
    llm.engine.add(samples)
    while llm.engine.has_work:
        with contextlib.suppress(KeyboardInterrupt):
            llm.engine.step()
    assert [s.token_ids for s in samples] == expected
