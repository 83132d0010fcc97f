"""Reading a prompt in chunks changes when others get their next token, never what anybody says."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.cache_utils import LinearAttentionLayer

from families import FAMILIES, WINDOW, base_model, pipo_model
from pipo import LLM, BaseForCausalLM, PipoForCausalLM, RequestOutput, SamplingParams
from pipo.engine.sequence import Sequence, StepText
from pipo.errors import ConfigError
from pipo.model.prefill import Prefill

PARAMS = SamplingParams(temperature=0, threshold=0.5, max_tokens=12, ignore_eos=True)
WHOLE = 100_000
# Beyond twice the window in pairs, and many times the chunks below.
LONG = [3 + (i * 7 + i * i) % 150 for i in range(8 * WINDOW + 3)]


def prompt(ids: list[int]) -> dict[str, list[int]]:
    return {"prompt_token_ids": ids}


def params(**changes: Any) -> SamplingParams:
    return dataclasses.replace(PARAMS, **changes)


def said(output: RequestOutput) -> tuple[Any, ...]:
    return output.token_ids, output.num_pairs, output.num_committed, output.num_cached_tokens


class Scene:
    """An engine that is stepped by hand, and what its samples did at which step."""

    def __init__(self, model: PipoForCausalLM | BaseForCausalLM, chunk: int = 5, **options: Any) -> None:
        self.llm = LLM(model, max_prefill_positions=chunk, **options)
        self.engine = self.llm.engine
        self.steps_of: dict[int, list[int]] = {}
        self.num_steps = 0

    def add(self, ids: list[int], settings: SamplingParams = PARAMS) -> list[Sequence]:
        samples = self.llm.prepare(prompt(ids), settings)
        self.engine.add(samples, self._listen)
        return samples

    def _listen(self, sequence: Sequence, step: StepText) -> None:
        self.steps_of.setdefault(sequence.request_id, []).append(self.num_steps)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.engine.step()
            self.num_steps += 1

    def finish(self) -> None:
        while self.engine.has_work:
            self.step()


@pytest.fixture(scope="module")
def model() -> PipoForCausalLM:
    return pipo_model("qwen3")


def alone(model: PipoForCausalLM | BaseForCausalLM, ids: list[int], settings: SamplingParams = PARAMS) -> Any:
    return LLM(model, max_prefill_positions=WHOLE).generate(prompt(ids), settings)[0]


# --- the same numbers -----------------------------------------------------------------------------------


def contents(prefill: Prefill) -> list[torch.Tensor]:
    """All that a prefill leaves: the last hidden states, then every layer's keys and values or states."""
    result = prefill.finish()
    found = [result.last_hidden_BH, result.run_mtp(torch.tensor([9]))]
    for layer in result.cache.layers:
        if isinstance(layer, LinearAttentionLayer):
            found += [state for states in (layer.conv_states, layer.recurrent_states) for state in states.values()]
        else:
            found += [layer.keys, layer.values]
    return found


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_parts_leave_what_the_whole_leaves(family: str) -> None:
    """Fails when a mask, a position, a state or what the MTP block reads is wrong at a chunk's edge."""
    for model, ids in ((pipo_model(family), [*LONG, 0]), (base_model(family), LONG)):
        whole = contents(Prefill(model, [ids]))
        rng = random.Random(1)
        parts = Prefill(model, [ids])
        while parts.left:
            parts.advance(rng.choice([1, 2, 3, 7, 16]))
        for one, other in zip(whole, contents(parts), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-4)


@torch.no_grad()
def test_an_eager_decoder_masks_a_chunk_not_the_square() -> None:
    model = base_model("gemma2")
    model.backbone.config._attn_implementation = "eager"
    prefill, seen = Prefill(model, [LONG]), []
    hook = model.backbone.decoder.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"].shape[-2:]), with_kwargs=True
    )
    while prefill.left:
        prefill.advance(20)
    hook.remove()
    assert seen == [(20, 20), (20, 40), (20, 60), (len(LONG) - 60, len(LONG))]


@pytest.mark.parametrize("method", ["pipo", "regular", "mtp", "speculative"])
@pytest.mark.parametrize("family", ["qwen3_5", "gemma2"])
def test_every_method_says_the_same(family: str, method: str) -> None:
    model = pipo_model(family) if method == "pipo" else base_model(family)
    prompts = [prompt(LONG[:n]) for n in (len(LONG), 1, 30, 12, 5, 61)]
    expected, got = (
        LLM(model, method=method, max_prefill_positions=chunk).generate(prompts, params(n=2)) for chunk in (WHOLE, 6)
    )
    assert [said(output) for output in got] == [said(output) for output in expected]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 70), st.integers(0, 3), st.integers(0, 5), st.integers(1, 3), st.integers(1, 14)),
        min_size=1,
        max_size=6,
    ),
    chunk=st.integers(1, 40),
    rows=st.sampled_from([2, 5, 64]),
    tight=st.booleans(),
)
def test_whoever_comes_when_gets_what_it_gets_alone(
    model: PipoForCausalLM, requests: list[tuple[int, int, int, int, int]], chunk: int, rows: int, tight: bool
) -> None:
    """Random prompts, arrivals, chunks, rows and memory; sampled, so that a wrong seed or position shows as well."""
    budget = LLM(model).engine.budget
    memory = 4 * (budget.row_bytes + 60 * budget.position_bytes) if tight else None
    scene = Scene(model, chunk, max_num_seqs=rows, cache_budget_bytes=memory, prefix_cache_bytes=2**16 * (chunk % 2))
    expected, samples = [], []
    for number, (length, wait, begin, n, max_tokens) in enumerate(requests):
        scene.step(wait)
        chosen = params(n=n, max_tokens=max_tokens, temperature=1.0, seed=number)
        ids = LONG[begin:][:length]
        samples += scene.add(ids, chosen)
        expected += LLM(model, max_prefill_positions=WHOLE).generate(prompt(ids), chosen)
    scene.finish()
    assert [s.output().token_ids for s in samples] == [output.token_ids for output in expected]
    assert scene.engine.runner.cache.num_rows == 0


# --- who waits for whom ---------------------------------------------------------------------------------


def test_others_write_on_between_the_chunks(model: PipoForCausalLM) -> None:
    """Fails when a long prompt holds up running samples for more than one chunk."""
    scene = Scene(model, chunk=5)
    (first,) = scene.add([5, 9, 40], params(max_tokens=60))
    scene.step(2)
    (long,) = scene.add(LONG)
    while not long.pairs:
        scene.step()
    num_chunks = -(-((len(LONG) + 1) // 2) // 5)
    steps = scene.steps_of[first.request_id]
    assert all(later - before <= 2 for before, later in itertools.pairwise(steps))
    assert len(first.pairs) == 2 + num_chunks - 1
    scene.finish()
    assert said(long.output()) == said(alone(model, LONG))
    assert long.first_token_s is not None
    assert long.first_token_s > long.arrival_s


def test_many_short_prompts_hold_others_up_no_more_than_a_long_one(model: PipoForCausalLM) -> None:
    scene = Scene(model, chunk=8)
    (first,) = scene.add([5, 9, 40], params(max_tokens=60))
    scene.step()
    calls: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["inputs_embeds"][..., 0].numel()), with_kwargs=True
    )
    for number in range(10):
        scene.add(LONG[number : number + 7], params(max_tokens=40))
    scene.step(20)
    hook.remove()
    assert max(calls) <= 11  # two prompts of four pairs, or eleven rows
    assert len(first.pairs) >= 6


def test_short_prompts_pass_a_long_one(model: PipoForCausalLM) -> None:
    """Fails when a short request waits until a long prompt, or the next long one in the queue, has been read."""
    scene = Scene(model, chunk=6)
    longs = [scene.add(LONG)[0], scene.add(LONG[1:])[0]]
    scene.step(2)
    (short,) = scene.add([5, 9, 40])
    scene.step(3)
    assert short.pairs
    assert not longs[0].pairs
    assert scene.engine.reading == longs[:1]
    assert list(scene.engine.waiting) == longs[1:]
    scene.finish()
    for sequence in (short, *longs):
        assert said(sequence.output()) == said(alone(model, sequence.prompt_ids))


@torch.no_grad()
def test_samples_of_one_prompt_share_its_chunks(model: PipoForCausalLM) -> None:
    """Each position is read once by backbone and MTP block, but for the last, which each sample's own token 1 follows."""
    scene, read = Scene(model, chunk=8), {"backbone": 0, "mtp": 0}

    def count(part: str, inputs: torch.Tensor) -> None:
        read[part] += inputs[..., 0].numel()

    hooks = [
        model.model.register_forward_pre_hook(
            lambda module, args, kwargs: count("backbone", kwargs["inputs_embeds"]), with_kwargs=True
        ),
        model.mtp.register_forward_pre_hook(lambda module, args: count("mtp", args[1])),
    ]
    samples = scene.add(LONG, params(n=4, temperature=1.0, seed=7))
    while not samples[0].pairs:
        scene.step()
    for hook in hooks:
        hook.remove()
    num_pairs = (len(LONG) + 1) // 2
    assert read == {"backbone": num_pairs, "mtp": num_pairs - 1 + 4}
    scene.finish()
    expected = LLM(model, max_prefill_positions=WHOLE).generate(prompt(LONG), params(n=4, temperature=1.0, seed=7))
    assert [said(s.output()) for s in samples] == [said(output) for output in expected]


def test_what_is_cached_of_a_long_prompt_makes_it_short() -> None:
    """The rest of it is read at once; a long rest in chunks, and the states where prompts branch off are kept all the same."""
    for family, num_cached in (("qwen3", 50), ("qwen3_5", 48)):
        cached = Scene(pipo_model(family), chunk=10, prefix_cache_bytes=2**26)
        for ids in (LONG, [*LONG[:50], 4, 5], [*LONG[:50], 6, 7, *LONG], [*LONG[:50], 6, 8]):
            (sequence,) = cached.add(ids)
            cached.finish()
            expected = alone(cached.llm.model, ids)
            assert sequence.output().token_ids == expected.token_ids
        assert sequence.num_cached_tokens == num_cached
        before = cached.num_steps
        (again,) = cached.add(LONG, params(max_tokens=1))
        cached.finish()
        assert again.num_cached_tokens >= num_cached
        assert cached.num_steps == before + 1


# --- what goes wrong ------------------------------------------------------------------------------------


def test_an_aborted_prompt_leaves_nothing(model: PipoForCausalLM) -> None:
    scene = Scene(model, chunk=5)
    (long,) = scene.add(LONG)
    (first,) = scene.add([5, 9, 40], params(max_tokens=40))
    scene.step(4)
    assert scene.engine.reading == [long]
    scene.engine.abort(long.request_id)
    assert long.finish_reason == "abort"
    assert scene.engine.reading == []
    scene.finish()
    assert said(first.output()) == said(alone(model, [5, 9, 40], params(max_tokens=40)))
    assert not scene.engine.has_work


def test_a_failure_in_a_chunk_loses_nobody(model: PipoForCausalLM) -> None:
    scene = Scene(model, chunk=5)
    (first,) = scene.add([5, 9, 40], params(max_tokens=40))
    scene.step(2)
    longs = [scene.add(LONG)[0], scene.add(LONG[2:])[0]]
    scene.step(3)

    def fail(module: Any, args: Any) -> None:
        raise RuntimeError("out of memory")

    for _ in range(2):  # once in a chunk, once in a decoding step
        hook = model.model.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            scene.step()
        hook.remove()
        assert scene.engine.reading == []
        assert list(scene.engine.waiting) == [first, *longs]
        scene.step(4)
    scene.finish()
    assert said(first.output()) == said(alone(model, [5, 9, 40], params(max_tokens=40)))
    for long in longs:
        assert said(long.output()) == said(alone(model, long.prompt_ids))


def test_memory_that_runs_out_sends_the_half_read_prompt_back(model: PipoForCausalLM) -> None:
    """Its positions count before they are read, so the running sample and it never hold more than the budget."""
    budget = LLM(model).engine.budget
    scene = Scene(model, chunk=1, cache_budget_bytes=2 * (budget.row_bytes + 100 * budget.position_bytes))
    (first,) = scene.add(LONG[:5], params(max_tokens=100, threshold=0.0))
    (long,) = scene.add(LONG)
    dropped = 0
    drop = scene.engine._drop_long

    def dropping() -> list[Sequence]:
        nonlocal dropped
        dropped += 1
        return drop()

    scene.engine._drop_long = dropping  # type: ignore[method-assign]
    scene.step(20)
    assert scene.engine.reading == [long]
    scene.engine.shrink(budget.row_bytes + 60 * budget.position_bytes)
    scene.step(2)
    assert dropped == 1
    assert list(scene.engine.waiting) == [long]
    scene.finish()
    assert said(first.output()) == said(alone(model, LONG[:5], params(max_tokens=100, threshold=0.0)))
    assert said(long.output()) == said(alone(model, LONG))


def test_preempted_samples_of_one_prompt_go_on_each_from_its_own_text(model: PipoForCausalLM) -> None:
    """Fails when what each has written is taken for the prompt that they had in common."""
    wanted = params(n=2, temperature=1.0, seed=11, max_tokens=16)
    scene = Scene(model, chunk=WHOLE)
    samples = scene.add(LONG[:9], wanted)
    scene.step(4)
    hook = model.model.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scene.step()
    hook.remove()
    scene.finish()
    expected = LLM(model).generate(prompt(LONG[:9]), wanted)
    assert expected[0].token_ids != expected[1].token_ids
    assert [said(s.output()) for s in samples] == [said(output) for output in expected]


def test_a_chunk_of_nothing_is_refused(model: PipoForCausalLM) -> None:
    with pytest.raises(ConfigError, match="max_prefill_positions must be at least 1, got 0"):
        LLM(model, max_prefill_positions=0)
