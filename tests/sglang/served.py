"""Models of each family, how they are stored, and how they are served."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints import save_pipo
from pipo import PipoForCausalLM
from servers import KEEPING_STATES, Server, serving


@dataclass(frozen=True)
class Case:
    """A checkpoint and its server's options."""

    family: str
    saved: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Served:
    """A running server and its model."""

    model: PipoForCausalLM
    server: Server
    hybrid: bool
    """Linear attention: the prefix cache goes on from kept states only."""


# Each family with another mixture of the rest: what is stored where, the compressor's kind, what the gate sees.
# The parts in which long prompts are read are short, so that tests need no long ones.
LLAMA = Case("llama", options={"chunked_prefill_size": 16})
QWEN3 = Case("qwen3", {"gate": "draft", "tie_word_embeddings": True}, {"chunked_prefill_size": 32})
QWEN3_5 = Case("qwen3_5", {"layout": "nested"}, {**KEEPING_STATES, "chunked_prefill_size": 64})
QWEN3_5_MOE = Case(
    "qwen3_5_moe",
    {"layout": "flat", "compressor": "linear", "gate": "draft"},
    {**KEEPING_STATES, "chunked_prefill_size": 64},
)
WITHOUT_OVERLAP = Case(
    "qwen3_5",
    options={
        "mamba_radix_cache_strategy": "no_buffer",
        "disable_overlap_schedule": True,
        "max_mamba_cache_size": 64,
        "chunked_prefill_size": 64,
    },
    environment={"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "5"},
)
TIGHT = Case(
    "qwen3_5",
    options={**QWEN3_5.options, "max_total_tokens": 330, "schedule_conservativeness": 0.1},
)
"""Memory for some of the requests that it lets in."""


@contextmanager
def start(folder: Path, case: Case) -> Iterator[Served]:
    """Write the checkpoint into `folder/model` and serve it."""
    model = save_pipo(folder / "model", case.family, **case.saved)
    with serving(folder / "model", case.environment, **case.options) as server:
        yield Served(model, server, case.family.startswith("qwen3_5"))
