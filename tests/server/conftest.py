"""A tiny random model over bytes, its server in this process, and a model that writes what a test dictates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from byte_tokenizer import byte_config, byte_tokenizer
from pipo import LLM, PipoConfig, PipoForCausalLM
from pipo.server.app import create_app
from pipo.server.settings import ServerSettings
from server_client import client_of

KEY = "sk-test"
TEMPLATE = (Path(__file__).parent / "qwen3_5.jinja").read_text()


def make_tokenizer(template: str | None = None) -> Any:
    tokenizer = byte_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def make_model() -> PipoForCausalLM:
    config = byte_config()
    torch.manual_seed(3)
    model = PipoForCausalLM(PipoConfig(config))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(scope="session")
def llm() -> LLM:
    return LLM(make_model(), tokenizer=make_tokenizer(), max_num_seqs=8, prefix_cache_bytes=2**22, remember_pairs=2**16)


@pytest.fixture(scope="session")
def qwen(llm: LLM) -> LLM:
    """The same model under a template with reasoning and tools."""
    return LLM(llm.model, tokenizer=make_tokenizer(TEMPLATE), max_num_seqs=8)


@pytest.fixture
def client(llm: LLM) -> httpx2.AsyncClient:
    return client_of(create_app(llm, ServerSettings()))


@pytest.fixture
def qwen_client(qwen: LLM) -> httpx2.AsyncClient:
    return client_of(create_app(qwen, ServerSettings()))


@pytest.fixture
def dictate(qwen: LLM, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that makes the model write a text, two bytes a step, whatever it is asked."""
    tokenizer = qwen.tokenizer

    def dictate(text: str) -> None:
        from pipo.engine.sequence import StepTokens

        ids = [*tokenizer.encode(text), tokenizer.eos_token_id]

        def steps(sequences: Any) -> list[StepTokens]:
            result = []
            for sequence in sequences:
                at = len(sequence.token_ids)
                token1, token2 = ids[at], ids[at + 1] if at + 1 < len(ids) else None
                result.append(
                    StepTokens(token1, token2, token2, confidence=1.0, judged=True, committed=token2 is not None)
                )
            return result

        join, decode = qwen.engine.runner.join, qwen.engine.runner.decode
        monkeypatch.setattr(qwen.engine.runner, "join", lambda s, prefill: (join(s, prefill), steps(s))[1])
        monkeypatch.setattr(qwen.engine.runner, "decode", lambda s: (decode(s), steps(s))[1])

    return dictate
