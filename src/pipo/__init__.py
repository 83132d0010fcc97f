"""Pair-In, Pair-Out language models: two tokens in, up to two tokens out per decoding step.

The public names below are loaded on first use, so `import pipo` costs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pipo import _autoclasses

if TYPE_CHECKING:
    from pipo.engine.llm import LLM
    from pipo.engine.request import RequestOutput, SamplingParams
    from pipo.errors import PipoError
    from pipo.model.base import BaseForCausalLM
    from pipo.model.config import PipoConfig
    from pipo.model.modeling import PipoForCausalLM

__all__ = [
    "LLM",
    "BaseForCausalLM",
    "PipoConfig",
    "PipoError",
    "PipoForCausalLM",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]

__version__ = "0.1.0"

_HOME = {
    "LLM": "pipo.engine.llm",
    "BaseForCausalLM": "pipo.model.base",
    "PipoConfig": "pipo.model.config",
    "PipoError": "pipo.errors",
    "PipoForCausalLM": "pipo.model.modeling",
    "RequestOutput": "pipo.engine.request",
    "SamplingParams": "pipo.engine.request",
}

_autoclasses.install()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pipo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
