"""The model: config, compressor, backbone, MTP block, confidence head, checkpoints, the pair step."""

from __future__ import annotations


def register() -> None:
    """Make transformers' auto classes know `model_type: pipo`. Repeated calls do nothing more."""
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoConfig.register("pipo", PipoConfig, exist_ok=True)
    AutoModelForCausalLM.register(PipoConfig, PipoForCausalLM, exist_ok=True)


from pipo.model.config import PipoConfig  # noqa: E402
from pipo.model.modeling import PipoForCausalLM  # noqa: E402

__all__ = ["PipoConfig", "PipoForCausalLM", "register"]
