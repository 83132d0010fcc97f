"""Plain completions in this process: the four forms of prompts, echo, log-probabilities, what is refused."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from openai.types import Completion

from pipo import LLM, SamplingParams
from server_client import ok, post, stream

ASK: dict[str, Any] = {"model": "pipo", "prompt": "Once", "temperature": 0, "ignore_eos": True, "threshold": 0.0}
PATH = "/v1/completions"


def reference(llm: LLM, prompts: Any, **changes: Any) -> list[Any]:
    params = {"temperature": 0, "max_tokens": 16, "ignore_eos": True, "threshold": 0.0} | changes
    return llm.generate(prompts, SamplingParams(**params))


def test_sixteen_tokens_unless_told_otherwise(client: httpx2.AsyncClient, llm: LLM) -> None:
    """OpenAI's default here. `null` is until the context is full; chat has no limit by default."""
    answer = Completion.model_validate(ok(post(client, ASK, PATH)))
    assert answer.choices[0].text == reference(llm, "Once")[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_all_forms_of_prompts_and_samples(client: httpx2.AsyncClient, llm: LLM) -> None:
    ids = llm.tokenizer.encode("Once")
    one = reference(llm, "Once")[0].text
    for prompt in ("Once", ids, ["Once"], [ids]):
        assert [c["text"] for c in ok(post(client, {**ASK, "prompt": prompt}, PATH))["choices"]] == [one]
    settings = {"temperature": 1.0, "seed": 3, "n": 2}
    expected = [output.text for output in reference(llm, ["Once", "Twice"], **settings)]
    ask = {**ASK, **settings, "prompt": ["Once", "Twice"]}
    body = ok(post(client, ask, PATH))
    assert [choice["text"] for choice in body["choices"]] == expected
    assert body["usage"]["prompt_tokens"] == len("OnceTwice")
    texts = [""] * 4
    for event in stream(client, ask, PATH):
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == expected


def test_echo_comes_first(client: httpx2.AsyncClient, llm: LLM) -> None:
    expected = "Once" + reference(llm, "Once")[0].text
    assert ok(post(client, {**ASK, "echo": True}, PATH))["choices"][0]["text"] == expected
    ids = llm.tokenizer.encode("Once")
    events = stream(client, {**ASK, "echo": True, "prompt": ids}, PATH)
    assert "".join(event["choices"][0]["text"] for event in events) == expected


def test_logprobs_in_completions_shape(client: httpx2.AsyncClient, llm: LLM) -> None:
    found = ok(post(client, {**ASK, "logprobs": 2}, PATH))["choices"][0]["logprobs"]
    (output,) = reference(llm, "Once", logprobs=2)
    assert found["token_logprobs"] == pytest.approx([one.logprob for one in output.logprobs], abs=1e-5)
    assert all(1 <= len(top) <= 2 for top in found["top_logprobs"])
    assert found["text_offset"] == [sum(map(len, found["tokens"][:i])) for i in range(16)]
    streamed = [event["choices"][0]["logprobs"] for event in stream(client, {**ASK, "logprobs": 2}, PATH)]
    assert [token for one in streamed for token in one["tokens"]] == found["tokens"]
    assert [offset for one in streamed for offset in one["text_offset"]] == found["text_offset"]


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": ""},
        {"prompt": [1, "a"]},
        {"prompt": [-1]},
        {"prompt": [9999]},
        {"suffix": "end"},
        {"best_of": 3},
        {"echo": True, "logprobs": 1},
        {"logprobs": 21},
        {"max_tokens": -1},
        {"messages": []},
        {"prompt": ["a"] * 200, "n": 128},
    ],
    ids=str,
)
def test_what_is_refused(client: httpx2.AsyncClient, changes: dict[str, Any]) -> None:
    response = post(client, {**ASK, **changes}, PATH)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]
