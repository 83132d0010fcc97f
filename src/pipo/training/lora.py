"""What is trained: LoRA on the layers' projections and some modules whole, or everything but embeddings and head. Section 4.

What is trained is float32, whatever the dtype of the rest: an update of 1e-4 would be lost in bfloat16's 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from pipo.errors import ConfigError
from pipo.model.modeling import PipoForCausalLM
from pipo.training.config import TuningSettings

Kind = Literal["sft", "opd"]

ADAPTER_NAME = "default"
DECODER_LAYERS = ("model.layers.", "mtp.layers.")
NEVER_TRAINED = ("embed_tokens", "lm_head")
"""Each is used twice, by backbone and MTP block, and tied to the other in many families: one trained alone would part from it."""
WHOLE_MODULES = (
    "compressor",
    "confidence_head",
    "mtp.fc",
    "mtp.norm",
    "mtp.pre_fc_norm_embedding",
    "mtp.pre_fc_norm_hidden",
)
FUSED_IN_EXPERTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Trainable:
    """What a prepared model trains.

    `lora_modules`: names of the linear layers with LoRA; `whole_modules`: of the modules trained in full (empty in full tuning, which
    trains all but `NEVER_TRAINED`). `not_adapted`: parameters of fused experts, which LoRA leaves as they are.
    """

    method: Literal["lora", "full"]
    rank: int
    alpha: float
    dropout: float
    lora_modules: tuple[str, ...]
    whole_modules: tuple[str, ...]
    not_adapted: tuple[str, ...]
    num_trained: int
    """Trained parameters."""
    num_parameters: int
    """All parameters, those of LoRA among them; a tied head counts once."""

    def describe(self) -> str:
        """One line for people."""
        share = self.num_trained / self.num_parameters
        parts = [f"{self.num_trained:,} of {self.num_parameters:,} parameters are trained ({share:.2%})"]
        if self.method == "lora":
            norms = [name for name in self.whole_modules if name.startswith(DECODER_LAYERS)]
            whole = [name for name in self.whole_modules if name not in norms]
            whole += [f"{len(norms)} norms of the MTP layer"] if norms else []
            parts.append(f"LoRA of rank {self.rank} on {len(self.lora_modules)} layers; whole: {', '.join(whole)}")
        if self.not_adapted:
            parts.append(f"experts are not adapted ({len(self.not_adapted)} fused tensors)")
        return "; ".join(parts)


def trainable_modules(model: nn.Module, tuning: TuningSettings, kind: Kind) -> Trainable:
    """What `tuning` would train of a model that is not prepared yet (one on the meta device will do).

    Raises:
        ConfigError: a target names embeddings or head, or no linear layer; the message lists those that there are.
    """
    if refused := [name for name in tuning.targets if name.split(".")[-1] in NEVER_TRAINED]:
        raise ConfigError(
            f"tuning.targets: {', '.join(refused)} can't be trained: embedding and head serve the backbone and the MTP block, and "
            "training one of a tied pair would part them"
        )
    parameters = dict(model.named_parameters())
    total = sum(p.numel() for p in parameters.values())
    if tuning.method == "full":
        trained = sum(p.numel() for name, p in parameters.items() if not _never_trained(name))
        return Trainable("full", 0, 0.0, 0.0, (), (), (), trained, total)
    lora, not_adapted = lora_layers(model, tuning)
    whole = (*WHOLE_MODULES, *(_mtp_layer_norms(model) if _with_mtp_norms(tuning, kind) else ()))
    modules = dict(model.named_modules())
    num_lora = sum(tuning.rank * sum(modules[name].weight.shape) for name in lora)
    num_whole = sum(p.numel() for name in whole for p in modules[name].parameters())
    return Trainable(
        "lora",
        tuning.rank,
        tuning.alpha,
        tuning.dropout,
        lora,
        whole,
        not_adapted,
        num_lora + num_whole,
        total + num_lora,
    )


def prepare_model(model: PipoForCausalLM, tuning: TuningSettings, kind: Kind) -> Trainable:
    """Freeze a model, add LoRA to it in place, and make what is trained float32. Raises as :func:`trainable_modules` does.

    LoRA starts at zero, so the model computes what it did before. Draws follow torch's seed. A model that is narrower than float32
    computes under autocast from here on: the fully trained modules are wider than what they read.
    """
    trainable = trainable_modules(model, tuning, kind)
    model.requires_grad_(False)
    if trainable.method == "full":
        for name, parameter in model.named_parameters():
            if not _never_trained(name):
                _make_trained(parameter)
        return trainable
    add_lora(model, trainable.lora_modules, tuning)
    modules = dict(model.named_modules())
    for name in trainable.whole_modules:
        for parameter in modules[name].parameters():
            _make_trained(parameter)
    return trainable


def add_lora(model: nn.Module, names: Sequence[str], tuning: TuningSettings) -> None:
    """LoRA in float32 on the linear layers of these names, in place."""
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules=list(names),
        bias="none",
    )
    inject_adapter_in_model(config, model, ADAPTER_NAME)
    layers = dict(model.named_modules())
    for layer in (layers[name] for name in names):
        if layer.weight.dtype != torch.float32 and hasattr(layer, "cast_input_dtype_enabled"):
            # Autocast brings input and LoRA to one dtype; peft's own cast would keep a float32 copy of each input.
            layer.cast_input_dtype_enabled = False
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            _make_trained(parameter)


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`(name, parameter)` of what is trained, in the model's order."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _make_trained(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.float()
    parameter.requires_grad_(True)


def _never_trained(name: str) -> bool:
    return any(part in NEVER_TRAINED for part in name.split("."))


def _with_mtp_norms(tuning: TuningSettings, kind: Kind) -> bool:
    return kind == "sft" if tuning.mtp_norms is None else tuning.mtp_norms


def lora_layers(model: nn.Module, tuning: TuningSettings) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the layers to adapt, and of the fused experts' parameters that LoRA leaves out."""
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(DECODER_LAYERS)
    }
    chosen = {name for name in linears if name.split(".")[-1] in tuning.targets and ".linear_attn." not in name}
    if tuning.linear_attention:
        mixers = {name for name in linears if ".linear_attn." in name}
        if not mixers:
            raise ConfigError("tuning.linear_attention: this model has no linear-attention mixers; leave it off")
        chosen |= mixers
    fused = tuple(name for name, p in model.named_parameters() if p.dim() == 3 and ".experts." in name)
    found = {name.split(".")[-1] for name in chosen}
    lost = [t for t in tuning.targets if t not in found and not (fused and t in FUSED_IN_EXPERTS)]
    if lost:
        there = sorted({name.split(".")[-1] for name in linears})
        raise ConfigError(
            f"tuning.targets: {', '.join(lost)} names no linear layer of this model; its layers have {', '.join(there)}"
        )
    return tuple(sorted(chosen)), fused


def _mtp_layer_norms(model: nn.Module) -> tuple[str, ...]:
    return tuple(
        name
        for name, module in model.named_modules()
        if name.startswith("mtp.layers.")
        and type(module).__name__.endswith("Norm")
        and next(module.parameters(False), None) is not None
    )
