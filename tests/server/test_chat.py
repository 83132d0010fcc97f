"""Chat completions in this process: what comes back, streamed or not, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from pipo import LLM, SamplingParams
from pipo.server.app import create_app
from pipo.server.settings import ServerSettings
from server_client import client_of, ok, post, stream

MEDIAN = 0.474
"""About half of this model's drafts reach it."""
ASK: dict[str, Any] = {
    "model": "pipo",
    "messages": [{"role": "user", "content": "Hi"}],
    "temperature": 1.0,
    "seed": 11,
    "max_tokens": 24,
    "ignore_eos": True,
    "threshold": MEDIAN,
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
        },
    },
}


def reference(llm: LLM, **changes: Any) -> Any:
    params = {name: ASK[name] for name in ("temperature", "seed", "max_tokens", "ignore_eos", "threshold")} | changes
    return llm.generate([{"role": "user", "content": "Hi"}], SamplingParams(**params))


# --- what comes back ----------------------------------------------------------------------------------


def test_a_chat_is_what_the_engine_writes(client: httpx2.AsyncClient, llm: LLM) -> None:
    body = ok(post(client, ASK))
    (output,) = reference(llm)
    answer = ChatCompletion.model_validate(body)
    assert answer.choices[0].message.content == output.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24
    details = answer.usage.completion_tokens_details
    assert details is not None
    assert details.accepted_prediction_tokens == output.num_committed
    assert details.rejected_prediction_tokens == output.num_rejected
    assert answer.usage.prompt_tokens == len(output.prompt_token_ids)


def test_a_stream_has_one_event_per_step_and_says_the_same(client: httpx2.AsyncClient, llm: LLM) -> None:
    events = stream(client, {**ASK, "stream_options": {"include_usage": True}})
    whole = ok(post(client, ASK))
    (output,) = reference(llm)
    *chunks, last = [ChatCompletionChunk.model_validate(event) for event in events]
    assert len(chunks) == output.num_pairs
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == output.text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all(event["usage"] is None for event in events[:-1])
    assert last.choices == []
    without_cache = {**whole["usage"], "prompt_tokens_details": None}
    assert {**events[-1]["usage"], "prompt_tokens_details": None} == without_cache


def test_a_stream_without_usage_has_none(client: httpx2.AsyncClient) -> None:
    assert all("usage" not in event and event["choices"] for event in stream(client, ASK))


def test_samples_have_seeds_of_their_own(client: httpx2.AsyncClient, llm: LLM) -> None:
    ask = {**ASK, "n": 3, "temperature": 1.0, "seed": 5}
    outputs = reference(llm, n=3, temperature=1.0, seed=5)
    body = ok(post(client, ask))
    assert [choice["message"]["content"] for choice in body["choices"]] == [output.text for output in outputs]
    assert body["usage"]["completion_tokens"] == 72
    texts = ["", "", ""]
    for event in stream(client, ask):
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [output.text for output in outputs]


def test_pairs_tell_the_whole_text_and_the_rejected_drafts(client: httpx2.AsyncClient, llm: LLM) -> None:
    events = stream(client, {**ASK, "return_pairs": True})
    (output,) = reference(llm, record_pairs=True)
    pairs = [pair for event in events for pair in event["choices"][0]["pairs"]]
    assert len(pairs) == output.num_pairs
    kept = "".join(pair["token1"] + (pair["draft"] if pair["committed"] else "") for pair in pairs)
    assert kept == output.text
    assert sum(pair["committed"] for pair in pairs) == output.num_committed
    assert output.num_rejected
    assert output.num_committed
    rejected = [pair for pair in pairs if pair["draft"] is not None and not pair["committed"]]
    assert all(pair["confidence"] < MEDIAN for pair in rejected)
    times = [pair["time_s"] for pair in pairs]
    assert times == sorted(times)
    assert ok(post(client, {**ASK, "return_pairs": True}))["choices"][0]["pairs"][0]["token1"] == pairs[0]["token1"]


def test_threshold_is_the_requests_or_the_servers(client: httpx2.AsyncClient) -> None:
    for threshold, committed in ((0.0, 12), (1.01, 0)):
        usage = ok(post(client, {**ASK, "threshold": threshold}))["usage"]
        assert usage["completion_tokens_details"]["accepted_prediction_tokens"] == committed


def test_logprobs_in_chats_shape(client: httpx2.AsyncClient, llm: LLM) -> None:
    ask = {**ASK, "logprobs": True, "top_logprobs": 3}
    (output,) = reference(llm, logprobs=3)
    content = ok(post(client, ask))["choices"][0]["logprobs"]["content"]
    assert len(content) == 24
    assert [entry["logprob"] for entry in content] == pytest.approx(
        [found.logprob for found in output.logprobs], abs=1e-5
    )
    assert all(len(entry["top_logprobs"]) == 3 for entry in content)
    letters = bytes(byte for entry in content for byte in entry["bytes"])
    assert letters.decode(errors="replace") == llm.tokenizer.decode(output.token_ids, skip_special_tokens=False)
    streamed = [entry for event in stream(client, ask) for entry in event["choices"][0]["logprobs"]["content"]]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in content]


def test_a_stop_string_ends_the_text_before_it(client: httpx2.AsyncClient, llm: LLM) -> None:
    text = reference(llm)[0].text
    stop = text[6:8]
    body = ok(post(client, {**ASK, "stop": stop}))
    assert body["choices"][0]["message"]["content"] == text[: text.index(stop)]
    assert body["choices"][0]["finish_reason"] == "stop"
    streamed = stream(client, {**ASK, "stop": [stop]})
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in streamed) == text[: text.index(stop)]


def test_logit_bias_and_penalties_reach_the_engine(client: httpx2.AsyncClient, llm: LLM) -> None:
    body = ok(post(client, {**ASK, "logit_bias": {"97": 100}}))
    assert body["choices"][0]["message"]["content"] == llm.tokenizer.decode([97]) * 24
    settings = {"presence_penalty": 2.0, "frequency_penalty": 1.0, "repetition_penalty": 1.5, "top_k": 5, "min_p": 0.01}
    expected = reference(llm, **settings)[0].text
    assert ok(post(client, {**ASK, **settings}))["choices"][0]["message"]["content"] == expected


def test_a_later_turn_is_not_prefilled_again(client: httpx2.AsyncClient) -> None:
    first = ok(post(client, ASK))
    reply = first["choices"][0]["message"]
    messages = [*ASK["messages"], reply, {"role": "user", "content": "And then?"}]
    second = ok(post(client, {**ASK, "messages": messages}))
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first["usage"]["prompt_tokens"] - 2


def test_turns_are_the_same_with_and_without_the_prefix_cache(llm: LLM) -> None:
    said: list[list[str]] = []
    for cache_bytes in (0, 2**22):
        fresh = LLM(llm.model, tokenizer=llm.tokenizer, prefix_cache_bytes=cache_bytes, remember_pairs=2**16)
        client = client_of(create_app(fresh, ServerSettings()))
        messages, cached = [{"role": "system", "content": "Be brief."}], 0
        for turn in range(4):
            messages.append({"role": "user", "content": f"Turn {turn}"})
            body = ok(post(client, {**ASK, "messages": messages}))
            messages.append(body["choices"][0]["message"])
            cached += body["usage"]["prompt_tokens_details"]["cached_tokens"]
        said.append([str(message["content"]) for message in messages])
        assert bool(cached) == bool(cache_bytes)
    assert said[0] == said[1]


# --- reasoning, tools, formats ------------------------------------------------------------------------


def ask_qwen(**changes: Any) -> dict[str, Any]:
    return {"model": "pipo", "messages": [{"role": "user", "content": "Weather?"}], "max_tokens": 400, **changes}


def merged(events: list[Any]) -> dict[str, Any]:
    """A stream's deltas put together, as clients do."""
    message: dict[str, Any] = {}
    for event in events:
        delta = event["choices"][0]["delta"]
        for name in ("reasoning", "reasoning_content", "content"):
            message[name] = message.get(name, "") + delta.get(name, "")
        for call in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if "id" in call:
                calls.append({"name": call["function"]["name"], "arguments": ""})
            calls[call["index"]]["arguments"] += call["function"]["arguments"]
    return message | {"finish_reason": events[-1]["choices"][0]["finish_reason"]}


def test_reasoning_comes_apart(qwen_client: httpx2.AsyncClient, dictate: Callable[[str], None]) -> None:
    dictate("I think\nso.\n</think>\n\nYes, indeed.\n")
    message = ok(post(qwen_client, ask_qwen()))
    assert message["choices"][0]["message"]["reasoning"] == "I think\nso."
    assert message["choices"][0]["message"]["reasoning_content"] == "I think\nso."
    assert message["choices"][0]["message"]["content"] == "Yes, indeed.\n"
    assert 10 < message["usage"]["completion_tokens_details"]["reasoning_tokens"] < 25
    streamed = merged(stream(qwen_client, ask_qwen()))
    assert streamed["reasoning"] == streamed["reasoning_content"] == "I think\nso."
    assert streamed["content"] == "Yes, indeed.\n"


def test_no_event_is_broken_by_what_looks_like_a_line_end(
    qwen_client: httpx2.AsyncClient, dictate: Callable[[str], None]
) -> None:
    """Clients that split lines as Python does would see half an event."""
    odd = "a\u2028b\u2029c\x85d\x0be\x1cf\r\ng"
    dictate("</think>" + odd)
    assert merged(stream(qwen_client, ask_qwen()))["content"] == odd


CALLS = (
    "Let me see.\n</think>\n\nOne moment.\n\n<tool_call>\n<function=weather>\n<parameter=city>\nBern\n</parameter>\n<parameter=days>\n3\n"
    "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=weather>\n<parameter=city>\n5\n</parameter>\n</function>\n</tool_call>"
)


def test_tool_calls_come_apart(qwen_client: httpx2.AsyncClient, dictate: Callable[[str], None]) -> None:
    dictate(CALLS)
    choice = ok(post(qwen_client, ask_qwen(tools=[WEATHER])))["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "One moment."
    assert [json.loads(call["function"]["arguments"]) for call in choice["message"]["tool_calls"]] == [
        {"city": "Bern", "days": 3},
        {"city": "5"},
    ]
    streamed = merged(stream(qwen_client, ask_qwen(tools=[WEATHER])))
    assert [call["name"] for call in streamed["tool_calls"]] == ["weather", "weather"]
    assert json.loads(streamed["tool_calls"][0]["arguments"]) == {"city": "Bern", "days": 3}
    assert streamed["finish_reason"] == "tool_calls"


def test_without_tools_a_call_is_text(qwen_client: httpx2.AsyncClient, dictate: Callable[[str], None]) -> None:
    dictate(CALLS)
    for changes in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        choice = ok(post(qwen_client, ask_qwen(**changes)))["choices"][0]
        assert "tool_calls" not in choice["message"]
        assert "<function=weather>" in choice["message"]["content"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_can_be_made_sure(qwen_client: httpx2.AsyncClient, choice: Any) -> None:
    """A random model, held to the grammar of the template's calls."""
    function = json.loads(json.dumps(WEATHER["function"]))
    function["parameters"]["properties"]["city"]["enum"] = ["Bern", "Genève"]
    ask = ask_qwen(
        tools=[{"type": "function", "function": function}],
        tool_choice=choice,
        parallel_tool_calls=False,
        chat_template_kwargs={"enable_thinking": False},
        temperature=1.0,
        seed=1,
    )
    answer = ok(post(qwen_client, ask))["choices"][0]
    (call,) = answer["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert call["function"]["name"] == "weather"
    assert arguments["city"] in ("Bern", "Genève")
    assert 1 <= arguments["days"] <= 9
    assert answer["finish_reason"] == "tool_calls"


def test_replies_of_a_schema(client: httpx2.AsyncClient) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer"}},
        "required": ["age"],
        "additionalProperties": False,
    }
    wish = {"type": "json_schema", "json_schema": {"name": "age", "schema": schema, "strict": True}}
    ask = {**ASK, "ignore_eos": False, "max_tokens": 200, "temperature": 1.0, "seed": 4, "n": 3}
    for choice in ok(post(client, {**ask, "response_format": wish}))["choices"]:
        assert isinstance(json.loads(choice["message"]["content"])["age"], int)
    free = ok(post(client, {**ask, "response_format": {"type": "json_object"}, "max_tokens": 12}))
    assert all(choice["message"]["content"].startswith("{") for choice in free["choices"])
    assert ok(post(client, {**ASK, "response_format": {"type": "text"}}))


def test_tool_turns_go_through_the_template(qwen_client: httpx2.AsyncClient, qwen: LLM) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Bern", "days": 2}'},
    }
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call],
            "refusal": None,
            "annotations": [],
            "reasoning": "Hm.",
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny"},
    ]
    body = ok(post(qwen_client, {"messages": messages, "tools": [WEATHER]}, "/tokenize"))
    text = qwen.tokenizer.decode(body["tokens"], skip_special_tokens=False)
    assert body["count"] == len(body["tokens"])
    assert "</tool_call>Be brief.<|im_end|>" in text
    assert "<think>\nHm.\n</think>\n\n\n<tool_call>\n<function=weather>\n<parameter=city>\nBern\n</parameter>" in text
    assert "<tool_response>\nSunny\n</tool_response>" in text
    assert text.endswith("<|im_start|>assistant\n<think>\n")
    assert ok(post(qwen_client, {"prompt": "abc"}, "/tokenize"))["tokens"] == qwen.tokenizer.encode("abc")


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"surprise": 1}, "surprise", "unknown_parameter"),
        ({"functions": []}, "functions", "unknown_parameter"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"temperature": True}, "temperature", "invalid_value"),
        ({"temperature": -1}, None, "invalid_value"),
        ({"top_p": 0}, None, "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 1.5}, "n", "invalid_value"),
        ({"seed": 2**70}, None, "invalid_value"),
        ({"max_tokens": 0}, None, "invalid_value"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"9999": 1}}, None, "invalid_value"),
        ({"logit_bias": {"1": 101}}, None, "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0", "invalid_value"),
        ({"messages": [{"role": "assistant"}]}, "messages.0.content", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            None,
            "invalid_value",
        ),
        ({"tools": [WEATHER]}, "tools", "unsupported"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs", "invalid_value"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nonsense"}}}},
            None,
            "invalid_value",
        ),
        ({"response_format": {"type": "yaml"}}, "response_format", "invalid_value"),
        ({"stop": ""}, None, "invalid_value"),
        ({"threshold": "high"}, "threshold", "invalid_value"),
    ],
    ids=str,
)
def test_wrong_fields_are_named(
    client: httpx2.AsyncClient, changes: dict[str, Any], param: str | None, code: str
) -> None:
    response = post(client, {**ASK, **changes})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["code"] == code
    if param is not None:
        assert error["param"] == param


def test_null_is_the_default(client: httpx2.AsyncClient) -> None:
    names = "top_p n stop seed presence_penalty logit_bias stream stream_options user top_k threshold return_pairs logprobs tools"
    assert ok(post(client, {**ASK, **dict.fromkeys(names.split())}))


def test_other_errors(client: httpx2.AsyncClient) -> None:
    missing = post(client, {**ASK, "model": "gpt-5"})
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
    long = post(client, {**ASK, "messages": [{"role": "user", "content": "x" * 9000}]})
    assert long.status_code == 400
    assert long.json()["error"]["code"] == "context_length_exceeded"
