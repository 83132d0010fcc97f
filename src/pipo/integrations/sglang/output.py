"""What leaves the scheduler: text, tokens and counts, never pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipo.integrations.sglang.hooks import Hook
from pipo.integrations.sglang.requests import as_tokens
from pipo.integrations.sglang.serving import served


def around_accept(accept: Callable[..., None], accumulator: Any, *, req: Any) -> None:
    """Everything that is streamed of a request passes here."""
    if served() is None:
        accept(accumulator, req=req)
        return
    with as_tokens(req):
        accept(accumulator, req=req)


HOOKS = (
    Hook(
        "managers.scheduler_components.output_streamer._GenerationStreamAccumulator.accept",
        "around",
        around_accept,
        ("self", "req"),
    ),
)
