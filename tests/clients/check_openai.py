"""The `openai` package, as its own documentation uses it."""

import asyncio
import json
import os

import openai
import pytest
from pydantic import BaseModel

MAJOR = int(openai.__version__.split(".")[0])
SETTINGS = {"model": "tiny", "temperature": 0, "max_tokens": 24}
HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


class Colour(BaseModel):
    red: bool
    green: bool


def arguments(**more) -> dict:
    base = {
        "base_url": os.environ["PIPO_URL"] + "/v1",
        "api_key": os.environ["PIPO_KEY"],
        "max_retries": 0,
        "timeout": 60,
    }
    return {**base, **more}


@pytest.fixture(scope="module")
def client():
    with openai.OpenAI(**arguments()) as client:
        yield client


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"


def test_chat(client):
    reply = client.chat.completions.create(messages=HELLO, **SETTINGS)
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content
    assert reply.choices[0].finish_reason in ("stop", "length")
    usage = reply.usage
    assert 0 < usage.completion_tokens <= 24
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    details = usage.completion_tokens_details
    assert details.accepted_prediction_tokens >= 0
    assert details.rejected_prediction_tokens >= 0
    assert usage.prompt_tokens_details.cached_tokens >= 0


def test_a_stream_says_what_one_piece_says(client):
    whole = client.chat.completions.create(messages=HELLO, **SETTINGS, extra_body={"threshold": 0.3})
    chunks = list(
        client.chat.completions.create(
            messages=HELLO,
            **SETTINGS,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"threshold": 0.3},
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({c.id for c in chunks}) == 1


def test_stream_helper(client):
    settings = {**SETTINGS, "max_tokens": 200}
    with client.chat.completions.stream(messages=HELLO, **settings, response_format=Colour) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content
    assert isinstance(final.choices[0].message.parsed, Colour)


def test_threshold_is_felt(client):
    def steps(threshold):
        reply = client.chat.completions.create(
            messages=HELLO, **SETTINGS, extra_body={"threshold": threshold, "ignore_eos": True}
        )
        return reply.usage.completion_tokens - reply.usage.completion_tokens_details.accepted_prediction_tokens

    assert steps(0) == 12
    assert steps(1.01) == 24


def test_completions(client):
    reply = client.completions.create(model="tiny", prompt=["Once", "Twice"], max_tokens=8, temperature=0, n=1)
    assert [choice.index for choice in reply.choices] == [0, 1]
    stream = client.completions.create(model="tiny", prompt="Once", max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == reply.choices[0].text


def test_samples_seeds_and_stops(client):
    sample = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 1.0, "n": 3}
    one, two = (client.chat.completions.create(**sample, seed=7) for _ in range(2))
    texts = [choice.message.content for choice in one.choices]
    assert texts == [choice.message.content for choice in two.choices]
    assert len(set(texts)) > 1
    whole = client.completions.create(model="tiny", prompt="abc", max_tokens=24, temperature=0).choices[0].text
    stop = whole[4]
    cut = client.completions.create(model="tiny", prompt="abc", max_tokens=24, temperature=0, stop=stop).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_logprobs(client):
    choice = client.chat.completions.create(messages=HELLO, **SETTINGS, logprobs=True, top_logprobs=3).choices[0]
    for token in choice.logprobs.content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob >= token.top_logprobs[2].logprob
        assert bytes(token.bytes) is not None
    text = client.completions.create(model="tiny", prompt="abc", max_tokens=5, temperature=0, logprobs=2).choices[0]
    assert len(text.logprobs.tokens) == len(text.logprobs.token_logprobs) == 5


def test_structured_output(client):
    reply = client.chat.completions.parse(
        model="tiny", messages=HELLO, response_format=Colour, temperature=0, max_tokens=200
    )
    assert isinstance(reply.choices[0].message.parsed, Colour)


def test_tools(client):
    reply = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=400,
    )
    assert reply.choices[0].finish_reason == "tool_calls"
    call = reply.choices[0].message.tool_calls[0]
    assert call.function.name == "weather"
    assert set(json.loads(call.function.arguments)) == {"city", "days"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    messages = [*HELLO, reply.choices[0].message.model_dump(exclude_none=True), result]
    assert client.chat.completions.create(messages=messages, tools=[WEATHER], **SETTINGS).choices


def test_tools_streamed(client):
    choice = {"type": "function", "function": {"name": "weather"}}
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, tools=[WEATHER], tool_choice=choice, temperature=0, max_tokens=400, stream=True
    )
    name, text = "", ""
    for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or []:
            name += call.function.name or ""
            text += call.function.arguments or ""
    assert name == "weather"
    assert json.loads(text)["days"] >= 1


@pytest.mark.parametrize(
    ("error", "change"),
    [
        (openai.NotFoundError, {"model": "gpt-17"}),
        (openai.BadRequestError, {"temperature": -1}),
        (openai.BadRequestError, {"messages": []}),
        (openai.BadRequestError, {"extra_body": {"no_such_field": 1}}),
        (openai.BadRequestError, {"messages": [{"role": "user", "content": "x" * 40000}]}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors(client, error, change, stream):
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"messages": HELLO, **SETTINGS, **change, "stream": stream})
    assert caught.value.body["message"]
    assert caught.value.body["type"]
    if len(str(change)) > 1000:
        assert caught.value.code == "context_length_exceeded"


def test_a_wrong_key():
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(**arguments(api_key="wrong")).models.list()


def test_many_at_once_and_some_that_leave():
    async def main():
        async with openai.AsyncOpenAI(**arguments()) as client:

            async def whole(i):
                reply = await client.chat.completions.create(
                    messages=[{"role": "user", "content": f"Hello {i}"}], **SETTINGS
                )
                return reply.choices[0].message.content

            async def leaves():
                long = {**SETTINGS, "max_tokens": 2000}
                async with await client.chat.completions.create(messages=HELLO, **long, stream=True) as stream:
                    async for _ in stream:
                        break

            alone = [await whole(i) for i in range(3)]
            together = await asyncio.gather(*(whole(i % 3) for i in range(12)), *(leaves() for _ in range(6)))
            assert together[:12] == alone * 4

    asyncio.run(main())
