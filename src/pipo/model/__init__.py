"""The model: config, compressor, backbone, MTP block, confidence head, checkpoints, the pair step.

Importing it registers `model_type: pipo` with transformers' auto classes; `import pipo` alone sees to it that they import this.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from pipo.model.config import PipoConfig
from pipo.model.modeling import PipoForCausalLM

__all__ = ["PipoConfig", "PipoForCausalLM"]

AutoConfig.register(PipoConfig.model_type, PipoConfig, exist_ok=True)
AutoModelForCausalLM.register(PipoConfig, PipoForCausalLM, exist_ok=True)
