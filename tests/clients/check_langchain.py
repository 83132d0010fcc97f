"""langchain-openai's chat model, with what chains are made of."""

import os

import openai
import pytest
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel


class Answer(BaseModel):
    """An answer."""

    right: bool


@tool
def weather(rainy: bool) -> str:
    """The weather."""
    return "rain" if rainy else "sun"


def chat(**more) -> ChatOpenAI:
    base = {"base_url": os.environ["PIPO_URL"] + "/v1", "api_key": os.environ["PIPO_KEY"], "model": "tiny"}
    return ChatOpenAI(**{**base, "temperature": 0, "max_tokens": 24, "max_retries": 0, **more})


def test_invoke_stream_and_batch():
    reply = chat().invoke("Hello")
    assert reply.content
    assert reply.usage_metadata["output_tokens"] <= 24
    chunks = list(chat(stream_usage=True).stream("Hello"))
    assert "".join(chunk.content for chunk in chunks) == reply.content
    assert (
        sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks)
        == reply.usage_metadata["output_tokens"]
    )
    assert [message.content for message in chat().batch(["Hello"] * 4)] == [reply.content] * 4


def test_structured_output():
    model = chat(max_tokens=200).with_structured_output(Answer, method="json_schema")
    assert isinstance(model.invoke("Is it so?"), Answer)


def test_tools():
    model = chat(max_tokens=300).bind_tools([weather], tool_choice="any", parallel_tool_calls=False)
    reply = model.invoke("How is the weather?")
    assert reply.tool_calls[0]["name"] == "weather"
    assert isinstance(reply.tool_calls[0]["args"]["rainy"], bool)
    assert weather.invoke(reply.tool_calls[0]).content in ("rain", "sun")


def test_log_probabilities_and_extensions():
    reply = chat(extra_body={"threshold": 0, "ignore_eos": True}).bind(logprobs=True).invoke("Hello")
    assert len(reply.response_metadata["logprobs"]["content"]) == 24
    assert reply.usage_metadata["output_tokens"] == 24


def test_completions():
    settings = {"base_url": os.environ["PIPO_URL"] + "/v1", "api_key": os.environ["PIPO_KEY"], "model": "tiny"}
    assert OpenAI(**settings, temperature=0, max_tokens=8).invoke("Once")


def test_errors():
    with pytest.raises(openai.AuthenticationError):
        chat(api_key="wrong").invoke("Hello")
    with pytest.raises(openai.BadRequestError):
        chat().invoke("x" * 40000)
