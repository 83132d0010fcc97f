"""A tiny student whose gate is undecided, a teacher beside it, and rollouts of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from byte_tokenizer import byte_config
from pipo import BaseForCausalLM, PipoConfig, PipoForCausalLM
from pipo.engine.request import PairRecord
from pipo.training.config import RolloutSettings
from pipo.training.rollout import Rollout

GOLDEN = Path(__file__).parent / "golden"
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14]]


def make_student(seed: int = 0, **config: Any) -> PipoForCausalLM:
    """Confidences spread around one half, so that a threshold there keeps some drafts and rejects others."""
    torch.manual_seed(seed)
    model = PipoForCausalLM(PipoConfig(byte_config(**config)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            if name.startswith("confidence_head.fc"):
                parameter.mul_(6)
    return model.train()


def make_teacher(seed: int = 1, **config: Any) -> BaseForCausalLM:
    torch.manual_seed(seed)
    model = BaseForCausalLM.from_config(byte_config(**config), mtp=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def settings(**changes: Any) -> RolloutSettings:
    """Short, mixed, and drawn from less than the whole distribution."""
    return RolloutSettings(**{"max_slots": 12, "threshold": 0.5, "cache_budget_bytes": 2**24, **changes})


def pair(token1: int, draft: int | None = None, committed: bool = False, **more: Any) -> PairRecord:
    values = {"confidence": 0.5, "logprob1": -1.0, "logprob2": -1.0, "drawn_logprob1": -1.0, "drawn_logprob2": -1.0}
    return PairRecord(token1=token1, draft=draft, committed=committed, **{**values, **more})


def rollout(prompt: list[int], *pairs: PairRecord, finish_reason: str = "stop") -> Rollout:
    return Rollout(prompt, list(pairs), finish_reason, 0.5)
