"""What a training run takes of a device's memory, by component, without running it.

The estimate is no formula: one step of the real model, with the real losses, is run on fake tensors, which have sizes and no data,
while a ledger counts what is alive. So it follows any family, LoRA, checkpointing and autocast. What several processes share is
divided afterwards. Not counted: the CUDA context (about 0.5 GB), what NCCL holds, and what the allocator loses between blocks.

Shape legend: B batch, T slots.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from pipo.errors import UnsupportedModelError
from pipo.losses import LocalTeacher, OutputMap, PairLosses, PairStates, ServedTeacher, Teacher
from pipo.model.backbone import checkpoint_activations
from pipo.model.base import BaseForCausalLM
from pipo.model.modeling import PipoForCausalLM
from pipo.model.row_state import measure_bytes, prefill_cache
from pipo.training.config import OpdConfig, TrainingConfig
from pipo.training.kernel_memory import fused_kernels
from pipo.training.ledger import MemoryLedger
from pipo.training.loss_memory import EveryPosition, objective_of
from pipo.training.teacher import cut_head

Kernels = Literal["cpu", "cuda"]

FROZEN, TRAINED, GRADIENTS, OPTIMIZER = "frozen weights", "trained weights", "gradients", "optimizer states"
KEPT, WORKING, LOSSES = "kept activations", "working set of a layer", "losses"
TEACHER, TEACHER_STATES, CACHES, EXCHANGE = "teacher weights", "teacher states", "rollout caches", "exchange buffers"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process allocates at most.

    `components`: at the peak, which is in phase `peak_phase`. `phases`: the peak of each. `notes`: what is not in it.
    """

    peak_bytes: int
    peak_phase: str
    components: dict[str, int]
    phases: dict[str, int]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class StepSize:
    """What one process does at once: `batch` rows of `slots` slots. A teacher's text has at most as many tokens."""

    slots: int
    batch: int = 1


def estimate_memory(
    config: TrainingConfig,
    model: PipoForCausalLM,
    teacher: BaseForCausalLM | None = None,
    *,
    size: StepSize,
    kernels: Kernels = "cuda",
    world_size: int = 1,
) -> MemoryEstimate:
    """The memory of the run that `config` describes, on each of `world_size` devices.

    Args:
        model: prepared for training, on device `meta`; of no use afterwards. teacher: of OPD, where it runs here, on `meta`.
        kernels: whose linear attention is counted: a GPU's fused kernels, or what runs on a CPU.

    Raises:
        UnsupportedModelError: the family decides sizes by values (experts that tokens are sent to), which fake tensors don't have.
    """
    if kernels == "cuda":
        _group_experts(model, teacher)
    ledger = MemoryLedger()
    phases: dict[str, Counter[str]] = {}
    notes: list[str] = []
    models = [model] if teacher is None else [model, teacher]
    try:
        with (
            fused_kernels(*models) if kernels == "cuda" else nullcontext(False) as has_kernels,
            FakeTensorMode(),
            ledger,
        ):
            _load(model, teacher, ledger)
            if isinstance(config, OpdConfig) and config.rollout.backend == "engine":
                phases["rollout"] = _rollout(config, model, ledger, notes)
            phases.update(_step(config, model, teacher, size, ledger))
    except DynamicOutputShapeException as error:
        raise UnsupportedModelError(
            f"the memory of {model.config.text_config.model_type!r} can't be estimated: it decides at run time which rows an expert "
            f"computes ({error.func})"
        ) from error
    if has_kernels:
        notes.append("linear attention as flash-linear-attention and causal-conv1d take it; plain PyTorch takes more")
    shared = {name: _divide(config, parts, model, world_size) for name, parts in phases.items()}
    peaks = {name: sum(parts.values()) for name, parts in shared.items()}
    peak = max(peaks, key=lambda name: peaks[name])
    return MemoryEstimate(peaks[peak], peak, dict(shared[peak]), peaks, tuple(notes))


STEP = "forward and backward"


def _group_experts(*models: PipoForCausalLM | BaseForCausalLM | None) -> None:
    """The experts as transformers runs them on a GPU: one grouped product, whose sizes no token decides."""
    for model in models:
        decoder: Any = None if model is None else model.model
        if decoder is not None and decoder._can_set_experts_implementation():
            decoder.set_experts_implementation("grouped_mm")


# --- what is there all the time ----------------------------------------------------------------------------


def _load(model: PipoForCausalLM, teacher: BaseForCausalLM | None, ledger: MemoryLedger) -> None:
    """Weights, gradients and AdamW's two moments as fake tensors, in place of the ones on `meta`. Its fused step needs no more."""
    _materialise(model, ledger, FROZEN, TRAINED)
    if teacher is not None:
        _materialise(teacher.requires_grad_(False), ledger, TEACHER, TEACHER)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        with ledger.part(GRADIENTS):
            parameter.grad = torch.empty_like(parameter)
        with ledger.part(OPTIMIZER):
            # Held by the parameter, as the optimizer would hold it.
            parameter.moments = [torch.empty_like(parameter) for _ in range(2)]


def _materialise(module: nn.Module, ledger: MemoryLedger, frozen: str, trained: str) -> None:
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                with ledger.part(trained if parameter.requires_grad else frozen):
                    data = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
            part._parameters[name] = made[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                with ledger.part(frozen):
                    part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


# --- phases -------------------------------------------------------------------------------------------------


def _autocast(config: TrainingConfig) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.model.dtype == "bfloat16")


def _rollout(config: OpdConfig, model: PipoForCausalLM, ledger: MemoryLedger, notes: list[str]) -> Counter[str]:
    """Caches of all rows at their longest, or as much as the settings allow. They are freed before the teacher reads."""
    with torch.no_grad(), ledger.part(CACHES), _autocast(config):
        cache = prefill_cache(model.config.text_config)
        hidden, call = model.run_backbone(torch.empty(1, 1, model.config.hidden_size, dtype=model.dtype), cache=cache)
        model.run_mtp(torch.zeros(1, 1, dtype=torch.long), hidden, call, cache)
        row_bytes, pair_bytes = measure_bytes(cache)
        del cache, hidden, call
    settings = config.rollout
    rows = min(settings.max_num_seqs, config.run.batch_size * config.run.accumulation)
    pairs = (settings.max_slots + config.data.max_prompt_tokens) // 2 + 1
    needed = rows * (row_bytes + pairs * pair_bytes)
    if settings.cache_budget_bytes is not None:
        needed = min(needed, settings.cache_budget_bytes)
    else:
        notes.append("rollouts take as much memory for caches as is free, up to what all rows need at their longest")
    parts = ledger.parts.copy()
    parts[CACHES] = needed
    return parts


def _step(
    config: TrainingConfig,
    model: PipoForCausalLM,
    teacher: BaseForCausalLM | None,
    size: StepSize,
    ledger: MemoryLedger,
) -> dict[str, Counter[str]]:
    phases: dict[str, Counter[str]] = {}
    targets: Teacher | None = None
    if isinstance(config, OpdConfig):
        ledger.reset_peak()
        # The teacher reads a micro-batch right before it is learnt from.
        targets = _targets(config, model, teacher, size, ledger)
        phases["teacher"] = ledger.parts_at_peak
    model.train()
    if config.run.gradient_checkpointing:
        checkpoint_activations(model)
    objective = EveryPosition(objective_of(config), targets)
    ledger.reset_peak()
    ids_BT = torch.zeros(size.batch, size.slots, dtype=torch.long)
    # Rows of different lengths need a mask, which attention holds for every pair of positions.
    mask_BT = torch.ones_like(ids_BT) if size.batch > 1 else None

    def counted(head: OutputMap, states: PairStates) -> PairLosses:
        with ledger.part(LOSSES):
            return objective(head, states)

    with ledger.part(KEPT), _autocast(config):
        loss = model(input_ids=ids_BT, attention_mask=mask_BT, labels=ids_BT, objective=counted).loss
    assert loss is not None
    with ledger.part(WORKING):
        loss.backward()
    phases[STEP] = ledger.parts_at_peak
    return phases


def _targets(
    config: OpdConfig, model: PipoForCausalLM, teacher: BaseForCausalLM | None, size: StepSize, ledger: MemoryLedger
) -> Teacher:
    """What a teacher leaves for the losses: hidden states, or a served one's best tokens for each head."""
    shape = (size.batch, size.slots // 2 - 1)
    if teacher is None:
        with ledger.part(TEACHER_STATES):
            of_both = torch.zeros(2, *shape, config.teacher.top_k, dtype=torch.long)
            return ServedTeacher(of_both[0], torch.zeros(2, *shape, config.teacher.top_k)[0])
    with torch.no_grad(), ledger.part(WORKING):
        hidden, _ = teacher.run_backbone(teacher.embed(torch.zeros(size.batch, size.slots, dtype=torch.long)))
    ledger.move(hidden, TEACHER_STATES)
    vocab_size = min(model.config.vocab_size, teacher.config.vocab_size)
    return LocalTeacher(hidden, cut_head(teacher.output_map(), vocab_size), torch.zeros(shape, dtype=torch.long))


# --- several processes ----------------------------------------------------------------------------------------


def _divide(config: TrainingConfig, parts: Counter[str], model: PipoForCausalLM, world_size: int) -> Counter[str]:
    """What one of `world_size` processes holds: DDP divides nothing, ZeRO-2 gradients and optimizer, FSDP2 the weights as well."""
    if world_size == 1:
        return +parts
    divided = parts.copy()
    strategy = config.run.strategy
    shared = {"ddp": (), "zero2": (GRADIENTS, OPTIMIZER), "fsdp2": (FROZEN, TRAINED, GRADIENTS, OPTIMIZER)}[strategy]
    for name in shared:
        divided[name] = math.ceil(parts[name] / world_size)
    if strategy == "fsdp2":
        divided[EXCHANGE] = _gathered_bytes(model)
    else:  # DDP's buckets, ZeRO's reduction: gradients once more
        divided[EXCHANGE] = parts[GRADIENTS]
    if isinstance(config, OpdConfig) and config.teacher.shard:
        divided[TEACHER] = math.ceil(parts[TEACHER] / world_size)
    return +divided


def _num_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _gathered_bytes(model: PipoForCausalLM) -> int:
    """Whole weights under FSDP2: the layer at work and the one that is fetched ahead, and all that lies outside the layers."""
    layers = [_num_bytes(layer) for layer in (*model.backbone.decoder.layers, *model.mtp.layers)]
    return 2 * max(layers) + _num_bytes(model) - sum(layers)
