"""What this process serves: the facts of a PIPO checkpoint, or nothing, and then every hook leaves SGLang alone.

SGLang runs one model per server, in several processes; each reads the checkpoint's config, which is where this is filled in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipo.pair_memory import PairMemory

MAX_REMEMBERED_TOKENS = 1_000_000
"""Of finished replies whose pairing is kept."""


@dataclass(frozen=True, slots=True)
class Served:
    """A PIPO checkpoint, as hooks need to know it."""

    pad_id: int
    vocab_size: int
    threshold: float
    """τ of requests that name none."""
    num_backbone_layers: int
    max_pairs: int
    """Positions of the backbone."""
    memory: PairMemory
    """How replies were paired. Each scheduler has its own."""


_served: Served | None = None


def served() -> Served | None:
    """The checkpoint that this process serves; `None`: a regular model."""
    return _served


def serve(config: Any) -> None:
    """Note that this process serves the checkpoint of `config`, as :func:`pipo.integrations.sglang.config.read` gave it."""
    global _served
    _served = Served(
        pad_id=config.pipo_pad_id,
        vocab_size=config.vocab_size,
        threshold=config.pipo_threshold,
        num_backbone_layers=config.pipo_num_backbone_layers,
        max_pairs=config.max_position_embeddings,
        memory=_served.memory if _served is not None else PairMemory(MAX_REMEMBERED_TOKENS),
    )


def current() -> Served:
    """Where it is known that a PIPO checkpoint is served."""
    assert _served is not None
    return _served
