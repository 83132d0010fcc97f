"""`model.generate(...)` for the usual Hugging Face habits."""

from __future__ import annotations


class PipoGenerationMixin:
    """Filled in below."""
