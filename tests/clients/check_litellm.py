"""litellm, as a proxy or an agent uses it."""

import json
import os

import litellm
import pytest
from check_openai import HELLO, WEATHER

SETTINGS = {
    "model": "openai/tiny",
    "api_base": os.environ["PIPO_URL"] + "/v1",
    "api_key": os.environ["PIPO_KEY"],
    "temperature": 0,
    "max_tokens": 24,
    "num_retries": 0,
}


def test_completion_and_usage():
    reply = litellm.completion(messages=HELLO, **SETTINGS)
    assert reply.choices[0].message.content
    assert reply.usage.completion_tokens <= 24


def test_stream():
    whole = litellm.completion(messages=HELLO, **SETTINGS)
    chunks = list(litellm.completion(messages=HELLO, **SETTINGS, stream=True, stream_options={"include_usage": True}))
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        == whole.choices[0].message.content
    )
    assert litellm.stream_chunk_builder(chunks).usage.completion_tokens == whole.usage.completion_tokens


def test_tools():
    settings = {**SETTINGS, "max_tokens": 400}
    reply = litellm.completion(
        messages=HELLO, **settings, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False
    )
    assert json.loads(reply.choices[0].message.tool_calls[0].function.arguments)["days"] >= 1


def test_structured_output():
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    reply = litellm.completion(messages=HELLO, **{**SETTINGS, "max_tokens": 100}, response_format=form)
    assert set(json.loads(reply.choices[0].message.content)) == {"ok"}


def test_text_completion():
    assert (
        litellm.text_completion(prompt="Once", **{**SETTINGS, "model": "text-completion-openai/tiny"}).choices[0].text
    )


@pytest.mark.parametrize(
    ("error", "change"),
    [
        (litellm.AuthenticationError, {"api_key": "wrong"}),
        (litellm.NotFoundError, {"model": "openai/gpt-17"}),
        (litellm.BadRequestError, {"temperature": -1}),
        (litellm.ContextWindowExceededError, {"messages": [{"role": "user", "content": "x" * 40000}]}),
    ],
)
def test_errors(error, change):
    with pytest.raises(error):
        litellm.completion(**{"messages": HELLO, **SETTINGS, **change})
