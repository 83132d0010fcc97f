"""Names of tensors: from any layout we read to the module names of `PipoForCausalLM`, and to the authors' layout.

Ours: `model.*`, `lm_head.weight` (absent when tied), `mtp.*`, `compressor.*`, `confidence_head.*`.
The authors': the same, the backbone also under `model.language_model.*`, experts fused or one by one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from pipo.errors import CheckpointError
from pipo.model.files import WeightFiles, key_error

EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<index>\d+)\.(?P<kind>gate_proj|up_proj|down_proj)\.weight")
VISION_PREFIXES = ("model.visual.", "visual.", "model.vision_tower.", "model.multi_modal_projector.")


def module_name(key: str) -> str:
    """A tensor's name without the multimodal prefix: `model.language_model.x → model.x`."""
    for prefix in ("model.language_model.", "language_model.model."):
        if key.startswith(prefix):
            return "model." + key.removeprefix(prefix)
    return key


def is_vision(key: str) -> bool:
    """Whether a tensor belongs to the vision part of a multimodal checkpoint, which a text model leaves out."""
    return key.startswith(VISION_PREFIXES)


def fused_name(name: str) -> str:
    """The name of the fused tensor that holds a single expert's matrix; other names as they are."""
    match = EXPERT.fullmatch(name)
    if match is None:
        return name
    return f"{match['experts']}.{'down_proj' if match['kind'] == 'down_proj' else 'gate_up_proj'}"


def read_named(files: WeightFiles, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """`(module name, tensor)` of the given keys; experts stored one by one are stacked to `[E, …]`."""
    experts: dict[str, dict[tuple[int, str], str]] = {}
    plain: list[str] = []
    for key in keys:
        match = EXPERT.fullmatch(module_name(key))
        if match is None:
            plain.append(key)
        else:
            parts = experts.setdefault(fused_name(module_name(key)), {})
            parts[int(match["index"]), match["kind"]] = key
    for key, tensor in files.read(plain):
        yield module_name(key), tensor
    for name, parts in experts.items():
        yield name, _stack_experts(files, name, parts)


def _stack_experts(files: WeightFiles, name: str, parts: dict[tuple[int, str], str]) -> Tensor:
    kinds = ("down_proj",) if name.endswith("down_proj") else ("gate_proj", "up_proj")
    num_experts = 1 + max(index for index, _ in parts)
    lost = [f"{name}: expert {i} {kind}" for i in range(num_experts) for kind in kinds if (i, kind) not in parts]
    if lost:
        raise key_error(files.folder, missing=lost)
    tensors = dict(files.read(parts.values()))
    try:
        return torch.stack([torch.cat([tensors[parts[i, kind]] for kind in kinds]) for i in range(num_experts)])
    except RuntimeError as error:
        raise key_error(files.folder, misshapen=[f"{name}: its experts differ in shape"]) from error


def refuse_stored_twice(files: WeightFiles, keys: list[str]) -> None:
    """Raise `CheckpointError` for tensors stored under both prefixes, or both as one and expert by expert."""
    names = [module_name(key) for key in keys]
    one_by_one = {fused_name(name) for name in names if EXPERT.fullmatch(name)}
    twice = [name for name, count in Counter(names).items() if count > 1 or name in one_by_one]
    if twice:
        raise key_error(files.folder, stored_twice=twice)


def load_strictly(
    module: nn.Module,
    files: WeightFiles,
    keys: Iterable[str],
    *,
    prefix: str = "",
    optional: frozenset[str] = frozenset(),
) -> None:
    """Copy tensors into a module's parameters and persistent buffers, all of them, and nothing else.

    Args:
        keys: the checkpoint's names to use. prefix: of the module's own names in the checkpoint.
        optional: module names that may be absent from the checkpoint (a tied head).

    Raises:
        CheckpointError: names every tensor that is missing, unexpected, misshapen or stored twice. The module is then
            of no use: some of its tensors may be written.
    """
    targets = {prefix + name: value for name, value in module.state_dict(keep_vars=True).items()}
    keys = list(keys)
    refuse_stored_twice(files, keys)
    names = {fused_name(module_name(key)) for key in keys}
    missing = sorted(set(targets) - names - optional)
    unexpected = sorted(names - set(targets))
    if missing or unexpected:
        raise key_error(files.folder, missing=missing, unexpected=unexpected)
    misshapen: list[str] = []
    with torch.no_grad():
        for name, tensor in read_named(files, keys):
            target = targets[name]
            if tensor.shape != target.shape:
                misshapen.append(f"{name} {tuple(tensor.shape)} should be {tuple(target.shape)}")
            elif tensor.is_floating_point() != target.is_floating_point():
                raise CheckpointError(f"{files.folder}: {name} is {tensor.dtype}; quantised weights are not read")
            else:
                target.copy_(tensor)
    if misshapen:
        raise key_error(files.folder, misshapen=misshapen)
