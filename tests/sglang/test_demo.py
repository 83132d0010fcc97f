"""The demo's checkpoint, served by `sglang serve` from the command line, through the `openai` client, beside the embedded engine."""

from pathlib import Path

import pytest
from openai import OpenAI

from pipo import LLM, SamplingParams
from pipo.demo.world import draw_problems
from servers import serving_by_command

DEMO = Path(__file__).parents[2] / "src/pipo/demo/checkpoints/papers-gate"
"""At this τ it commits some drafts of each question and rejects some; the gate that sees the draft rejects none here."""
QUESTIONS = [problem.text for problem in draw_problems(7, 4, "test")]
TAU = 0.9
GREEDY = SamplingParams(temperature=0, max_tokens=120, threshold=TAU)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    log = tmp_path_factory.mktemp("demo") / "server.log"
    with serving_by_command(DEMO, log, enable_cache_report=True) as server:
        yield OpenAI(base_url=f"{server.url}/v1", api_key="none")


@pytest.fixture(scope="module")
def llm():
    return LLM(DEMO, dtype="float32", remember_pairs=100_000)


def ask(client, messages, **options):
    gate = {"custom_params": {"threshold": TAU}}
    return client.chat.completions.create(
        model="demo", messages=messages, temperature=0, max_tokens=120, extra_body=gate, **options
    )


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_chat_is_the_embedded_engines_and_hits_the_cache(client, llm, question):
    """Two turns: text and counts of the embedded engine, and the second turn's history comes from the cache, rejected drafts and all."""
    messages = [{"role": "user", "content": question}]
    (theirs,) = llm.generate(messages, GREEDY)
    assert theirs.num_committed > 0, "nothing is committed, so nothing is seen"
    assert theirs.num_rejected > 0, "nothing is rejected, so nothing is seen"
    first = check(ask(client, messages), theirs)

    messages += [{"role": "assistant", "content": theirs.text}, {"role": "user", "content": QUESTIONS[0]}]
    (theirs,) = llm.generate(messages, GREEDY)
    second = check(ask(client, messages), theirs)
    # The last pair is computed when there is something behind it; it may hold one token or two.
    assert second.prompt_tokens_details.cached_tokens >= first.total_tokens - 3


def check(mine, theirs):
    """The usage, where the reply is the embedded engine's."""
    assert mine.choices[0].message.content == theirs.text
    assert mine.choices[0].finish_reason == theirs.finish_reason
    assert mine.usage.prompt_tokens == len(theirs.prompt_token_ids)
    assert mine.usage.completion_tokens == len(theirs.token_ids)
    return mine.usage


def test_a_stream_says_the_same(client, llm):
    """Piece by piece, and the usage at the end."""
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    (theirs,) = llm.generate(messages, GREEDY)
    chunks = list(ask(client, messages, stream=True, stream_options={"include_usage": True}))
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == theirs.text
    assert len([piece for piece in pieces if piece]) > 3
    assert chunks[-1].usage.completion_tokens == len(theirs.token_ids)
