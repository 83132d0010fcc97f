"""What a training run takes of a device's memory, by component, without running it.

The estimate is no formula: one step of the real model, with the real losses, is run on fake tensors, which have sizes and no data,
while a ledger counts what is alive. So it follows any family, LoRA, checkpointing and autocast. What several processes share is
divided afterwards. Not counted: the CUDA context (about 0.5 GB), what NCCL holds, and what the allocator loses between blocks.

Shape legend: B batch, T slots, S steps that have a next pair, N supervised positions, H width.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from pipo.errors import UnsupportedModelError
from pipo.losses import LocalTeacher, OutputMap, Teacher
from pipo.losses.chunked import CHUNK_BYTES, NUM_WIDE, head_pass
from pipo.losses.confidence import confidence_loss
from pipo.losses.objective import CrossEntropy, Full, Objective, Sampled, TopK
from pipo.losses.pair import PairLosses, PairStates
from pipo.model.base import BaseForCausalLM
from pipo.model.modeling import PipoForCausalLM
from pipo.model.row_state import measure_bytes, prefill_cache
from pipo.training.config import DivergenceSettings, OpdConfig, TrainingConfig
from pipo.training.kernel_memory import fused_kernels
from pipo.training.ledger import MemoryLedger

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
    """What one process does at once: `batch` rows of `slots` slots; `teacher_tokens` in each row of the teacher's."""

    slots: int
    batch: int = 1
    teacher_tokens: int = 0


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
    phases["optimizer step"] = _optimizer_step(phases[STEP], model, kernels)
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
    """Weights, gradients and AdamW's two moments as fake tensors, in place of the ones on `meta`."""
    _materialise(model, ledger, FROZEN, TRAINED)
    if teacher is not None:
        _materialise(teacher.requires_grad_(False), ledger, TEACHER, TEACHER)
    for parameter in trained_parameters(model):
        with ledger.part(GRADIENTS):
            parameter.grad = torch.empty_like(parameter)
        with ledger.part(OPTIMIZER):
            # Held by the parameter, as the optimizer would hold it.
            parameter.moments = [torch.empty_like(parameter) for _ in range(2)]  # type: ignore[attr-defined]


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


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer gets."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# --- phases -------------------------------------------------------------------------------------------------


def _rollout(config: OpdConfig, model: PipoForCausalLM, ledger: MemoryLedger, notes: list[str]) -> Counter[str]:
    """Caches of all rows at their longest, or as much as the settings allow. They are freed before the teacher reads."""
    with torch.no_grad(), ledger.part(CACHES):
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
    targets: LocalTeacher | None = None
    if teacher is not None:
        ledger.reset_peak()
        texts = [_score(teacher, size, ledger)]
        with ledger.part(TEACHER_STATES):
            texts += [torch.empty_like(texts[0]) for _ in range(config.run.accumulation - 1)]
        phases["teacher"] = ledger.parts_at_peak
        positions = torch.zeros(size.batch, size.slots // 2 - 1, dtype=torch.long)
        targets = LocalTeacher(texts[0], teacher.output_map(), positions)
    model.train()
    if config.run.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    objective = _EveryPosition(_objective(config), targets, ledger)
    ledger.reset_peak()
    ids_BT = torch.zeros(size.batch, size.slots, dtype=torch.long)
    low = config.model.dtype == "bfloat16"
    with ledger.part(KEPT), torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        loss = model(input_ids=ids_BT, labels=ids_BT, objective=objective).loss
    assert loss is not None
    with ledger.part(WORKING):
        loss.backward()
    phases[STEP] = ledger.parts_at_peak
    return phases


def _score(teacher: BaseForCausalLM, size: StepSize, ledger: MemoryLedger) -> Tensor:
    """Hidden states of the teacher, which are kept until the losses have read them."""
    with torch.no_grad(), ledger.part(WORKING):
        ids = torch.zeros(size.batch, size.teacher_tokens or size.slots, dtype=torch.long)
        hidden, _ = teacher.run_backbone(teacher.embed(ids))
    ledger.move(hidden, TEACHER_STATES)
    return hidden


def _objective(config: TrainingConfig) -> Objective:
    if not isinstance(config, OpdConfig):
        return CrossEntropy()
    settings: DivergenceSettings = config.divergence
    if settings.mode == "full":
        return Full(settings.beta)
    return TopK(settings.k, settings.beta) if settings.mode == "topk" else Sampled()


@dataclass(frozen=True)
class _EveryPosition:
    """The losses of a step in which every position is supervised: which ones are is not known of fake tensors, and this is the most."""

    objective: Objective
    teacher: LocalTeacher | None
    ledger: MemoryLedger

    def __call__(self, head: OutputMap, states: PairStates) -> PairLosses:
        """See :class:`pipo.losses.PairObjective`."""
        with self.ledger.part(LOSSES):
            token1, _ = self._pass(head, states.backbone_hidden, states.labels1)
            token2, found = self._pass(head, states.mtp_hidden, states.labels2)
            logits_N = states.confidence_logits.reshape(-1).clone()
            gate = confidence_loss(logits_N, found)
            return PairLosses(token1 + token2 + gate, token1, token2, gate, logits_N.sigmoid(), found)

    def _pass(self, head: OutputMap, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        hidden_NH = hidden.reshape(-1, hidden.shape[-1]).clone()
        return _FewChunks.apply(hidden_NH, head, self.objective, labels.reshape(-1).clone(), self.teacher)  # type: ignore[no-untyped-call,no-any-return]


class _FewChunks(torch.autograd.Function):
    """The chunked pass over the head. All chunks take the same memory, so the first two stand for all."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, head: OutputMap, objective: Objective, labels_N: Tensor, teacher: Teacher | None
    ) -> tuple[Tensor, Tensor]:
        gradient_NH = torch.empty_like(hidden_NH)
        num = 2 * max(1, CHUNK_BYTES // (NUM_WIDE * head.vocab_size * 4))
        with torch.enable_grad():
            few = hidden_NH[:num].detach().requires_grad_()
            weights = torch.ones(len(few))
            total, _ = head_pass(few, head, objective, labels_N[:num], weights, teacher=teacher)
        ctx.save_for_backward(gradient_NH)
        found_N = torch.empty(len(hidden_NH))
        ctx.mark_non_differentiable(found_N)
        return total.detach(), found_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NH,) = ctx.saved_tensors
        return gradient_NH * gradients[0], None, None, None, None


def _optimizer_step(step: Counter[str], model: PipoForCausalLM, kernels: Kernels) -> Counter[str]:
    """AdamW's temporaries: of one tensor at a time on a CPU, of all of them on a GPU."""
    sizes = [parameter.numel() * parameter.element_size() for parameter in trained_parameters(model)]
    parts = Counter({name: step[name] for name in (FROZEN, TRAINED, GRADIENTS, OPTIMIZER, TEACHER, TEACHER_STATES)})
    parts["optimizer's temporaries"] = sum(sizes) if kernels == "cuda" else max(sizes, default=0)
    return parts


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
        divided[EXCHANGE] = 2 * max(_num_bytes(layer) for layer in model.backbone.decoder.layers) + _outside_layers(
            model
        )
    else:  # DDP's buckets, ZeRO's reduction: gradients once more
        divided[EXCHANGE] = parts[GRADIENTS]
    if isinstance(config, OpdConfig) and config.teacher.shard:
        divided[TEACHER] = math.ceil(parts[TEACHER] / world_size)
    return +divided


def _num_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _outside_layers(model: PipoForCausalLM) -> int:
    """Weights outside the decoder's layers, which are gathered together while the model runs."""
    return _num_bytes(model) - sum(_num_bytes(layer) for layer in model.backbone.decoder.layers)
