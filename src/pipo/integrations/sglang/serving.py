"""What this process serves: the facts of a PIPO checkpoint, or nothing, and then every hook leaves SGLang alone.

SGLang runs one model per server, in several processes; each reads the checkpoint's config, which is where this is filled in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipo.pair_memory import PairMemory

if TYPE_CHECKING:
    from pipo.model.config import PipoConfig

MAX_REMEMBERED_TOKENS = 1_000_000
"""Of finished replies whose pairing is kept."""


@dataclass(frozen=True, slots=True)
class Served:
    """A PIPO checkpoint, as hooks need to know it."""

    config: PipoConfig
    """With the server's changes."""
    has_vision: bool
    """Its base is multimodal: tensors of the vision part are left out."""
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


def serve(config: PipoConfig, has_vision: bool) -> None:
    """Note that this process serves a checkpoint, as :func:`pipo.integrations.sglang.config.read` gave it."""
    global _served
    _served = Served(
        config=config,
        has_vision=has_vision,
        pad_id=int(config.pad_token_id),
        vocab_size=config.vocab_size,
        threshold=config.threshold,
        num_backbone_layers=int(config.text_config.num_hidden_layers),
        max_pairs=config.max_position_embeddings,
        memory=_served.memory if _served is not None else PairMemory(MAX_REMEMBERED_TOKENS),
    )


def forget() -> None:
    """Note that this process serves a regular model, whatever it served before."""
    global _served
    _served = None


def current() -> Served:
    """Where it is known that a PIPO checkpoint is served."""
    assert _served is not None
    return _served
