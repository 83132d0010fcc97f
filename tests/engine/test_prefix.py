"""The prefix cache changes how fast a request is served, never what it says."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from families import FAMILIES, VOCAB, pipo_model
from pipo import LLM, SamplingParams
from pipo.engine import runner
from pipo.pairing import Pair

MEBIBYTE = 2**20
PARAMS = SamplingParams(temperature=0, threshold=0.5, max_tokens=13, ignore_eos=True, record_pairs=True)


def prompt(ids: list[int]) -> dict[str, list[int]]:
    return {"prompt_token_ids": ids}


def said(output: Any) -> tuple[Any, ...]:
    return output.token_ids, output.num_pairs, output.num_committed


def conversations(seed: int) -> list[list[int]]:
    """Prompts that share beginnings of every kind: none, whole, odd and even lengths, branching inside a pair."""
    rng = random.Random(seed)
    system = [rng.randrange(3, 160) for _ in range(21)]
    made = [system + [rng.randrange(3, 160) for _ in range(n)] for n in (5, 8, 5, 30)]
    made += [made[0], made[1][:-1], [*made[3][:40], 7, 8, 9], system, system[:-1], made[3]]
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_said_is_the_same_with_and_without(family: str) -> None:
    """Fails when a reused entry, state or MTP slot is not what a full prefill would have made."""
    model = pipo_model(family)
    plain, cached = LLM(model), LLM(model, prefix_cache_bytes=64 * MEBIBYTE)
    reused = 0
    for ids in conversations(1):
        expected, got = plain.generate(prompt(ids), PARAMS)[0], cached.generate(prompt(ids), PARAMS)[0]
        assert said(got) == said(expected)
        for one, other in zip(expected.pairs or [], got.pairs or [], strict=True):
            assert one.confidence == pytest.approx(other.confidence, abs=1e-4)
        reused += got.num_cached_tokens
    assert reused > 100
    # All at once, and preempted, over what is kept.
    params = [dataclasses.replace(PARAMS, temperature=1.0, seed=i) for i in range(10)]
    expected_all = plain.generate([prompt(c) for c in conversations(1)], params)
    assert [said(o) for o in cached.generate([prompt(c) for c in conversations(1)], params)] == [
        said(o) for o in expected_all
    ]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_the_next_turn_reads_the_reply_as_it_was_written(family: str) -> None:
    """With the pairing remembered, a chat's second turn takes over the first turn and its reply, rejected drafts and all."""
    model = pipo_model(family)
    outputs: dict[int, list[Any]] = {}
    previous: list[int] = []
    probe = LLM(model).generate(prompt([5, 9, 40]), dataclasses.replace(PARAMS, max_tokens=60))[0]
    shown = sorted(p.confidence for p in probe.pairs or [] if p.confidence is not None)
    threshold = shown[len(shown) // 2] + 1e-3
    for cache_bytes in (0, 64 * MEBIBYTE):
        llm = LLM(model, prefix_cache_bytes=cache_bytes, remember_pairs=10_000)
        text: list[int] = [5, 9, 40]
        previous: list[int] = []
        for turn in range(3):
            output = llm.generate(prompt(text), dataclasses.replace(PARAMS, max_tokens=25, threshold=threshold))[0]
            assert 0 < output.num_committed < output.num_pairs
            if cache_bytes and turn:
                assert output.num_cached_tokens >= len(previous) - 3
            previous = text + output.token_ids
            text = [*previous, 33, 34, 35 + turn]
            outputs.setdefault(cache_bytes, []).append(said(output))
    assert outputs[0] == outputs[64 * MEBIBYTE]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_several_samples_of_a_kept_prompt(family: str) -> None:
    """They share what is left of the prefill, and what was kept of the MTP block's cache."""
    model = pipo_model(family)
    cached, ids = LLM(model, prefix_cache_bytes=64 * MEBIBYTE), list(range(5, 40))
    params = dataclasses.replace(PARAMS, n=3, temperature=1.0, seed=3)
    expected = [said(output) for output in LLM(model).generate(prompt(ids), params)]
    for _ in range(3):  # where there are states, the second prefill finds out at which point to keep them
        outputs = cached.generate(prompt(ids), params)
        assert [said(output) for output in outputs] == expected
    assert outputs[0].num_cached_tokens > 0


def test_requests_that_never_draft_leave_no_broken_mtp_entries() -> None:
    model = pipo_model("qwen3")
    llm = LLM(model, prefix_cache_bytes=64 * MEBIBYTE)
    ids = list(range(5, 40))
    llm.generate(prompt(ids), dataclasses.replace(PARAMS, threshold=1.01, record_pairs=False))
    drafting = dataclasses.replace(PARAMS, threshold=0.0)
    assert said(llm.generate(prompt(ids), drafting)[0]) == said(LLM(model).generate(prompt(ids), drafting)[0])


def test_memory_is_bounded_and_the_oldest_goes_first() -> None:
    model = pipo_model("qwen3_5")
    llm = LLM(model, prefix_cache_bytes=MEBIBYTE // 2)
    prefixes = llm.engine.runner.prefixes  # type: ignore[attr-defined]
    for start in range(20):
        llm.generate(prompt([start + 3] * 40), PARAMS)
        assert prefixes.num_bytes <= prefixes.max_bytes
    assert 0 < len(prefixes) < 20
    llm.generate(prompt([22] * 40), PARAMS)  # finds out at which point to keep states
    assert llm.generate(prompt([22] * 40), PARAMS)[0].num_cached_tokens > 0
    assert llm.generate(prompt([3] * 40), PARAMS)[0].num_cached_tokens == 0
    llm.forget()
    assert len(prefixes) == 0
    assert llm.generate(prompt([22] * 40), PARAMS)[0].num_cached_tokens == 0


class _FailsAfter:
    """A grammar that lets a few steps through and then allows nothing."""

    def __init__(self, steps: int) -> None:
        self.left, self.failed, self.complete = steps, False, False

    def allowed(self) -> torch.Tensor:
        self.left -= 1
        self.failed = self.left < 0
        return torch.ones(VOCAB, dtype=torch.bool)

    def allowed_after(self, token: int) -> torch.Tensor:
        return torch.ones(VOCAB, dtype=torch.bool)

    def accept(self, token: int) -> None:
        pass


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_a_sample_that_fails_leaves_nothing_wrong_behind(family: str) -> None:
    """Fails when the states of a step that did not count are kept under the positions before it."""
    model = pipo_model(family)
    llm = LLM(model, prefix_cache_bytes=64 * MEBIBYTE)
    (sample,) = llm.prepare(prompt(list(range(5, 30))), dataclasses.replace(PARAMS, threshold=0.0))
    sample.constraint = _FailsAfter(4)  # type: ignore[assignment]
    llm.engine.add([sample])
    while llm.engine.has_work:
        llm.engine.step()
    assert sample.finish_reason == "error"
    goes_on = [*range(5, 30), *sample.token_ids[1:], 33, 34]
    for ids in (goes_on, [*list(range(5, 30)), *sample.token_ids, 33, 34]):
        packed = LLM(model)
        samples = llm.prepare(prompt(ids), PARAMS)
        again = packed.prepare(prompt(ids), PARAMS)
        pairs = [*sample.prompt_pairs, *sample.pairs, Pair(33, 34)]
        samples[0].prompt_pairs = again[0].prompt_pairs = pairs
        for engine, (one,) in ((llm.engine, samples), (packed.engine, again)):
            engine.add([one])
            while engine.has_work:
                engine.step()
        assert samples[0].token_ids == again[0].token_ids


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
@pytest.mark.parametrize("where", ["write_pair", "fetch"])
def test_a_step_cut_off_midway_costs_nobody_a_token(family: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C inside a step: who goes on, and who comes later to the same prefix, gets what it would have got."""
    model = pipo_model(family)
    prompts = [prompt([5, 9, 40]), prompt(list(range(5, 30)))]
    params = dataclasses.replace(PARAMS, temperature=1.0, seed=3)
    expected = [LLM(model).generate(p, params)[0].token_ids for p in prompts]
    original, calls = getattr(runner, where), []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) in (1, 4, 5):  # in a prefill, and in two decoding steps
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(runner, where, interrupted)
    llm = LLM(model, prefix_cache_bytes=64 * MEBIBYTE)
    samples = [llm.prepare(p, params)[0] for p in prompts]
    llm.engine.add(samples)
    num_interrupts = 0
    while llm.engine.has_work:
        try:
            llm.engine.step()
        except KeyboardInterrupt:
            num_interrupts += 1
    assert num_interrupts == 3
    assert [s.token_ids for s in samples] == expected
    assert [llm.generate(p, params)[0].token_ids for p in prompts] == expected
    assert llm.engine.runner.cache.num_rows == 0
