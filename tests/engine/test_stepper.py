"""Asyncio callers: they never wait for a step, share the decoding, fail alone, and leave nothing behind."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import aclosing
from typing import Any

import pytest

from families import pipo_model
from pipo import LLM, SamplingParams
from pipo.errors import ConfigError, ContextLengthError

PARAMS = SamplingParams(temperature=0, threshold=0.0, max_tokens=40, ignore_eos=True)


def prompt(*ids: int) -> dict[str, Any]:
    return {"prompt_token_ids": list(ids)}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(pipo_model("qwen3"), max_num_seqs=4)


def test_the_event_loop_does_not_wait_for_a_step(llm: LLM) -> None:
    """Even while another thread holds the engine, preparing, submitting and cancelling return at once."""

    async def run() -> None:
        started = time.perf_counter()
        events = llm.run_requests([await asyncio.to_thread(llm.prepare, prompt(5, 6), PARAMS)])
        first = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await events.aclose()
        assert time.perf_counter() - started < 0.5

    held = threading.Event()

    def hold() -> None:
        with llm._lock:
            held.set()
            time.sleep(1.0)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    asyncio.run(run())
    thread.join()
    wait_until_idle(llm)


def test_several_requests_of_one_caller(llm: LLM) -> None:
    async def run() -> dict[int, list[int]]:
        requests = [llm.prepare(prompt(5 + i), PARAMS) for i in range(6)]
        tokens: dict[int, list[int]] = {i: [] for i in range(6)}
        async with aclosing(llm.run_requests(requests)) as events:
            async for number, event in events:
                tokens[number] += event.token_ids
        return tokens

    alone = {i: llm.generate(prompt(5 + i), PARAMS)[0].token_ids for i in range(6)}
    assert asyncio.run(run()) == alone


def test_events_are_snapshots_that_cost_no_copies(llm: LLM) -> None:
    """A caller who reads late finds each event as it was, and until then none holds a copy of the sample."""

    async def run() -> None:
        events = llm.run_requests([llm.prepare(prompt(9, 8, 7), PARAMS)])
        first = (await anext(events))[1]
        while llm.engine.has_work:
            await asyncio.sleep(0.01)
        later = [event async for _, event in events]
        assert first.output.num_pairs == 1
        assert first.output.finish_reason is None
        assert [len(event.output.token_ids) for event in later] == list(range(4, 42, 2))
        assert not any(isinstance(value, list) for event in later for value in vars(event).values())

    asyncio.run(run())


def test_a_step_that_fails_reaches_every_caller_and_the_next_is_served(llm: LLM, monkeypatch: Any) -> None:
    async def run() -> list[Any]:
        return await asyncio.gather(*(llm.agenerate(prompt(5, i), PARAMS) for i in range(3)), return_exceptions=True)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "join", fail)
        assert all(isinstance(result, RuntimeError) for result in asyncio.run(run()))
    wait_until_idle(llm)
    assert all(len(result[0].token_ids) == 40 for result in asyncio.run(run()))


def test_the_thread_ends_when_there_is_nothing_to_do_and_comes_back(llm: LLM, monkeypatch: Any) -> None:
    monkeypatch.setattr("pipo.engine.stepper.LINGER_S", 0.05)
    for _ in range(2):
        assert len(asyncio.run(llm.agenerate(prompt(5), PARAMS))[0].token_ids) == 40
        until = time.perf_counter() + 10
        while llm._stepper._thread is not None:
            assert time.perf_counter() < until
            time.sleep(0.01)


def test_a_smaller_budget_shortens_the_context() -> None:
    engine = LLM(pipo_model("qwen3"), cache_budget_bytes=2**22).engine
    before = engine.max_model_len
    engine.shrink(2**20)
    assert engine.budget.total_bytes == 2**20
    assert engine.budget.max_length() == engine.max_model_len < before
    assert not engine.runner.cache.fits(1, before)
    with pytest.raises(ConfigError, match="hold no request"):
        engine.shrink(1)


def test_a_prompt_too_long_is_told_apart(llm: LLM) -> None:
    with pytest.raises(ContextLengthError, match="leaves no room"):
        llm.prepare(prompt(*[5] * 9000), PARAMS)


def test_cached_tokens_are_the_prompts_own() -> None:
    """A preempted sample goes on from its own cache; that is no prompt that was found."""
    llm = LLM(pipo_model("qwen3"), prefix_cache_bytes=2**24)
    samples = llm.prepare(prompt(*range(5, 25)), PARAMS)
    llm.engine.add(samples)
    llm.engine.step()
    llm.engine.step()
    llm.engine.waiting.appendleft(llm.engine.running[0])
    llm.engine._leave(0)
    while llm.engine.has_work:
        llm.engine.step()
    assert samples[0].output().num_cached_tokens == 0


def wait_until_idle(llm: LLM) -> None:
    until = time.perf_counter() + 5
    while llm.engine.has_work or llm._stepper._inbox or llm._stepper._subscriptions:
        assert time.perf_counter() < until, "the engine is still at work"
        time.sleep(0.01)
