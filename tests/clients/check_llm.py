"""The `llm` command, told of the server by its file of further OpenAI-compatible models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODELS = """
- model_id: pipo
  model_name: tiny
  api_base: "{url}/v1"
  api_key_name: pipo
  supports_schema: true
  supports_tools: true
"""


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    (folder / "extra-openai-models.yaml").write_text(MODELS.format(url=os.environ["PIPO_URL"]))
    (folder / "keys.json").write_text(json.dumps({"pipo": os.environ["PIPO_KEY"]}))
    environment = {**os.environ, "LLM_USER_PATH": str(folder)}
    command = str(Path(sys.executable).with_name("llm"))

    def run(*arguments, rc=0):
        done = subprocess.run(
            [command, *arguments], env=environment, capture_output=True, timeout=90, stdin=subprocess.DEVNULL
        )
        assert done.returncode == rc, done.stderr.decode()
        return (done.stdout if rc == 0 else done.stderr).decode()

    return run


OPTIONS = ("-o", "temperature", "0", "-o", "max_tokens", "24")


def test_a_prompt_streamed_or_not(llm):
    streamed, whole = llm("-m", "pipo", *OPTIONS, "Hello"), llm("-m", "pipo", *OPTIONS, "--no-stream", "Hello")
    assert streamed == whole
    assert streamed.strip()
    logged = json.loads(llm("logs", "--json", "-n", "1"))
    assert logged[0]["prompt"] == "Hello"
    assert logged[0]["output_tokens"] <= 24


def test_a_conversation_goes_on(llm):
    assert llm("-c", *OPTIONS, "And then?")
    turns = json.loads(llm("logs", "--json", "-n", "2"))
    assert len({turn["conversation_id"] for turn in turns}) == 1


def test_a_schema(llm):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    reply = llm(
        "-m", "pipo", "-o", "temperature", "0", "-o", "max_tokens", "100", "--schema", json.dumps(schema), "Is it so?"
    )
    assert set(json.loads(reply)) == {"ok"}


def test_an_error_is_told(llm):
    assert "Error" in llm("-m", "pipo", "-o", "temperature", "0", "x" * 40000, rc=1)
