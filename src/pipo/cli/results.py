"""A generation result, as a row of JSON and as a line for people."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipo.engine.request import RequestOutput


def as_row(output: RequestOutput) -> dict[str, Any]:
    """Every field of the result, and the figures that follow from them."""
    figures = ("num_tokens", "commit_rate", "tokens_per_step")
    return {**asdict(output), **{name: getattr(output, name) for name in figures}}


def describe(output: RequestOutput) -> str:
    """One line: how it ended, tokens, steps, rejected drafts, times."""
    parts = [
        f"{output.finish_reason or 'interrupted'}",
        f"{output.num_tokens} tokens in {output.num_pairs} steps ({output.tokens_per_step:.2f} a step)",
        f"{output.num_rejected} drafts rejected",
    ]
    if output.ttft_s is not None:
        parts.append(f"TTFT {output.ttft_s * 1e3:.1f} ms")
    if output.tpot_s is not None:
        parts.append(f"TPOT {output.tpot_s * 1e3:.1f} ms")
    return " · ".join(parts)
