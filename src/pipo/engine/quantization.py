"""Weights of eight bits, by torchao: those of the linear layers of backbone and MTP block. What they are multiplied with stays as it is.

The head stays whole, which decides between tokens that are close; so do embeddings, and compressor and confidence head, which are small.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import nn

from pipo.errors import ConfigError

Quantization = Literal["int8", "fp8"]
"""`int8`: whole numbers with one scale a row, on any device. `fp8`: e4m3 with one scale a row, on GPUs that have it."""

FP8_CAPABILITY = (8, 9)
QUANTIZED = ("model.", "mtp.")
"""Where the linear layers stand whose weights are quantised: the decoder and the MTP block."""


def check_quantization(kind: str, device: torch.device) -> None:
    """Whether weights can be quantised so for a device.

    Raises:
        ConfigError: an unknown kind, no torchao, or a device without such numbers.
    """
    if kind not in get_args(Quantization):
        raise ConfigError(f"quantization must be one of {', '.join(get_args(Quantization))}, got {kind!r}")
    if kind == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY):
        raise ConfigError(
            f"quantization='fp8' needs a GPU with 8-bit floats (compute capability 8.9 or more), and the device is {device}: "
            "use 'int8'"
        )
    _torchao()


@torch.no_grad()
def quantize(model: nn.Module, kind: str) -> None:
    """Quantise the weights of a loaded PIPO or base model in place, on the device where they are.

    Raises:
        ConfigError: as :func:`check_quantization`.
    """
    device = next(model.parameters()).device
    check_quantization(kind, device)
    torchao = _torchao()
    config = torchao.Int8WeightOnlyConfig() if kind == "int8" else torchao.Float8WeightOnlyConfig()
    torchao.quantize_(model, config, filter_fn=_is_quantized_layer)


def is_quantized(model: nn.Module) -> bool:
    """Whether :func:`quantize` has been here."""
    return any(type(parameter).__module__.startswith("torchao.") for parameter in model.parameters())


def _is_quantized_layer(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name.startswith(QUANTIZED)


def _torchao() -> Any:
    try:
        from torchao import quantization
    except ImportError as error:
        raise ConfigError("quantised weights need torchao: pip install 'pipo-llm[quant]'") from error
    return quantization
