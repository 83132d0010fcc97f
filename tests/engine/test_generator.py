"""The embedded engine as a generator: its samples, its failures, and its end."""

import asyncio

import pytest

from byte_tokenizer import TEMPLATE, byte_config, byte_tokenizer
from pipo import LLM, PipoForCausalLM, SamplingParams
from pipo.engine.generator import EngineGenerator, opening_of_thinking
from pipo.model.config import PipoConfig

CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def llm():
    import torch

    torch.manual_seed(0)
    model = PipoForCausalLM(PipoConfig(text_config=byte_config().to_dict())).eval()
    return LLM(model, tokenizer=byte_tokenizer(), max_model_len=64)


def generate(llm, messages, seeds, **params):
    generator = EngineGenerator(llm, SamplingParams(**params), "tiny")
    return asyncio.run(generator.generate(messages, seeds))


def test_a_sample_per_seed_with_its_counts(llm):
    samples = generate(llm, CHAT, [1, 2, 3], max_tokens=9, ignore_eos=True, threshold=2.0)
    assert [sample.num_tokens for sample in samples] == [9, 9, 9]
    assert [sample.finished for sample in samples] == [False] * 3
    assert len({sample.text for sample in samples}) == 3
    again = generate(llm, CHAT, [1, 5, 6], max_tokens=9, ignore_eos=True, threshold=2.0)
    assert [sample.text for sample in again] == [sample.text for sample in samples]  # the first seed stands for all
    assert samples[0].meta["num_pairs"] == 9


def test_a_prompt_that_is_too_long_is_a_failure_of_its_own(llm):
    samples = generate(llm, [{"role": "user", "content": "x" * 500}], [1, 2])
    assert [sample.finished for sample in samples] == [False, False]
    assert "no room" in samples[0].error or "positions" in samples[0].error


def test_it_describes_what_decides_the_text(llm):
    about = EngineGenerator(llm, SamplingParams(temperature=0.5, seed=3), "tiny").describe()
    assert about == {
        "generator": "engine",
        "model": "tiny",
        "method": "pipo",
        "sampling": {"temperature": 0.5},
    }


@pytest.mark.parametrize(
    ("written", "opening"),
    [("", ""), ("<think>\n", "<think>\n"), ("<think>\n\n</think>\n\n", "")],
    ids=["none", "open", "closed"],
)
def test_the_opening_of_the_thinking_is_what_the_template_writes(llm, monkeypatch, written, opening):
    end = "<|im_start|>assistant\n"
    monkeypatch.setattr(llm.tokenizer, "chat_template", TEMPLATE.replace(end, end + written))
    assert opening_of_thinking(llm, [{"role": "user", "content": "what does <think> mean?</think>"}]) == opening


def test_when_it_is_closed_nothing_runs_any_more(llm):
    generator = EngineGenerator(llm, SamplingParams(max_tokens=60, ignore_eos=True), "tiny")

    async def cancel():
        tasks = [asyncio.create_task(generator.generate(CHAT, [n] * 4)) for n in range(4)]
        while not llm.engine.has_work:
            await asyncio.sleep(0.001)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(cancel())
    generator.close()
    assert not llm.engine.has_work
