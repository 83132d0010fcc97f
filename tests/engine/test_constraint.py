"""Structured output in pairs: both tokens follow the grammar, and others in the batch never notice."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
import torch

from byte_tokenizer import byte_tokenizer
from families import config_of
from pipo import LLM, PipoConfig, PipoForCausalLM, SamplingParams
from pipo.errors import RequestError

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
PARAMS = SamplingParams(temperature=1.0, threshold=0.0, max_tokens=200, seed=1)


@pytest.fixture(scope="module")
def llm() -> LLM:
    tokenizer = byte_tokenizer()
    config = config_of("qwen3")
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    torch.manual_seed(3)
    return LLM(PipoForCausalLM(PipoConfig(config)).eval(), tokenizer=tokenizer, seed=0)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.01])
def test_json_fits_its_schema(llm: LLM, threshold: float) -> None:
    params = dataclasses.replace(PARAMS, json_schema=SCHEMA, threshold=threshold, n=8)
    for output in llm.generate("Who?", params):
        assert output.finish_reason == "stop"
        value = json.loads(output.text)
        assert len(value["name"]) <= 5
        assert 0 <= value["age"] <= 150
        if threshold == 0.0:
            assert output.num_committed >= output.num_pairs - 1


def test_regex_and_grammar(llm: LLM) -> None:
    by_regex = llm.generate("When?", dataclasses.replace(PARAMS, regex=r"[0-9]{4}-[0-9]{2}", n=4))
    assert all(re.fullmatch(r"\d{4}-\d{2}", output.text) for output in by_regex)
    by_grammar = llm.generate("Well?", dataclasses.replace(PARAMS, grammar='start: "yes" | "no"', n=4))
    assert {output.text for output in by_grammar} <= {"yes", "no"}


def test_free_requests_beside_it_are_untouched(llm: LLM) -> None:
    free = dataclasses.replace(PARAMS, max_tokens=20)
    alone = llm.generate("Hello", free)[0]
    together = llm.generate(["Hello", "Who?"], [free, dataclasses.replace(PARAMS, json_schema=SCHEMA)])
    assert together[0].token_ids == alone.token_ids
    json.loads(together[1].text)


def test_bad_grammars_are_refused_before_anything_runs(llm: LLM) -> None:
    free = dataclasses.replace(PARAMS, max_tokens=20)
    alone = llm.generate("Hello", free)[0]
    with pytest.raises(RequestError, match="grammar"):
        llm.generate("Who?", dataclasses.replace(PARAMS, grammar="start: undefined_rule"))
    with pytest.raises(RequestError, match="grammar"):
        llm.generate("Who?", dataclasses.replace(PARAMS, json_schema="{not json"))
    with pytest.raises(RequestError, match="one at a time"):
        dataclasses.replace(PARAMS, regex="a", grammar="b")
    assert llm.generate("Hello", free)[0].token_ids == alone.token_ids
    assert not llm.engine.has_work
