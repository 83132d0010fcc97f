"""Merged models against base + adapter run side by side; bases that are PIPO models; bases that are not the right ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from families import VOCAB
from pipo import PipoForCausalLM
from pipo.errors import CheckpointError
from pipo.model.checkpoint import merge_adapter
from pipo.model.fingerprint import base_fingerprint

Checkpoints = Callable[..., Path]
TARGETS = tuple(f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down"))
RANK, SCALE = 4, 0.5


def start_of(base: Path, **options: Any) -> PipoForCausalLM:
    """The model that training starts from."""
    raw = json.loads((base / "config.json").read_text())
    make = PipoForCausalLM.from_pretrained if raw["model_type"] == "pipo" else PipoForCausalLM.from_base
    return make(base, **options)


def write_adapter(folder: Path, base: Path, seed: int = 1, **additional: Any) -> Path:
    """A random adapter as SFT and OPD write it: LoRA on every target that is a linear layer, compressor and gate whole."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    model = start_of(base)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(TARGETS):
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, module.in_features, generator=generator) * 0.1
            tensors[f"{name}.lora_B.weight"] = torch.randn(module.out_features, RANK, generator=generator) * 0.1
    for name, parameter in model.named_parameters():
        if name.startswith(("compressor.", "confidence_head.", "mtp.fc.", "mtp.norm.")):
            tensors[name] = parameter.detach().float() + torch.randn(parameter.shape, generator=generator) * 0.01
    folder.mkdir(parents=True)
    save_file({f"base_model.model.{k}": v for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK * SCALE, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "additional_config.json").write_text(
        json.dumps({"compressor_type": "mlp", "base_fingerprint": base_fingerprint(base), **additional})
    )
    return folder


def side_by_side(base: Path, adapter: Path, **options: Any) -> PipoForCausalLM:
    """Base and adapter unmerged: each adapted layer adds `scale · B A x` to what it gives."""
    model = start_of(base, **options)
    tensors = {
        k.removeprefix("base_model.model."): v for k, v in load_file(adapter / "adapter_model.safetensors").items()
    }
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            modules[name.removesuffix(".lora_A.weight")].register_forward_hook(
                lambda _, args, out, a=tensor, b=b: out + SCALE * F.linear(F.linear(args[0], a), b)
            )
        elif "lora_" not in name:
            parameters[name].data.copy_(tensor)
    return model


def outputs(model: PipoForCausalLM) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(3, VOCAB, (2, 14), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        out = model(input_ids=ids, return_logits=True)
    return out.logits, out.mtp_logits, out.confidence_logits


@pytest.mark.parametrize("kind", ["base", "pipo"])
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next", "qwen3_moe", "qwen3_tied", "gemma2", "cohere2"])
def test_merged_is_base_plus_adapter(family: str, kind: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Breaks when a matrix, a scale or a whole module is left out; experts that no adapter reaches stay as they were.

    The tolerance is float32's own: `(W + sBA)x` and `Wx + sB(Ax)` are summed in another order.
    """
    base = checkpoints(kind, family)
    adapter = write_adapter(tmp_path / "adapter", base)
    merged, rounding = merge_adapter(adapter)
    assert rounding.largest == 0.0
    for found, expected in zip(outputs(merged), outputs(side_by_side(base, adapter)), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    for found, expected in zip(outputs(merged), outputs(start_of(base)), strict=True):
        assert (found - expected).abs().max() > 1e-3


def test_the_stated_rounding_is_the_largest(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Breaks when the base's rounding enters twice, when whole modules are not counted, or when the figure is of one layer only."""
    adapter = write_adapter(tmp_path / "adapter", checkpoints("base"))
    merged, rounding = merge_adapter(adapter, dtype=torch.bfloat16)
    low = start_of(checkpoints("base"), dtype="bfloat16").float()  # what the bfloat16 base holds, exactly
    tensors = load_file(adapter / "adapter_model.safetensors")
    differences: dict[str, float] = {}
    for name, parameter in merged.named_parameters():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        exact = tensors.get(f"base_model.model.{name}")
        if f"{prefix}.lora_A.weight" in tensors:
            product = tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]
            exact = low.get_parameter(name) + SCALE * product
        if exact is not None:
            differences[name] = float((parameter.detach().float() - exact.detach()).abs().max())
    assert rounding.largest == max(differences.values()) > 0
    assert rounding.parameter == max(differences, key=lambda name: differences[name])


def test_an_adapter_on_an_adapter(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """OPD of an unmerged SFT adapter: the inner one is merged first."""
    inner = write_adapter(tmp_path / "sft", checkpoints("base"))
    PipoForCausalLM.from_pretrained(inner).save_pretrained(tmp_path / "sft-merged")
    direct = write_adapter(tmp_path / "direct", tmp_path / "sft-merged", seed=2)
    raw = json.loads((direct / "adapter_config.json").read_text())
    expected = merge_adapter(direct)[0].state_dict()
    (direct / "adapter_config.json").write_text(json.dumps({**raw, "base_model_name_or_path": str(inner)}))
    config = {"compressor_type": "mlp", "base_fingerprint": base_fingerprint(inner)}
    (direct / "additional_config.json").write_text(json.dumps(config))
    for name, value in merge_adapter(direct)[0].state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_another_base_is_refused(checkpoints: Checkpoints, changed: Callable[..., Path], tmp_path: Path) -> None:
    """Breaks when an adapter lands on weights that it was not trained on, and the result is quietly wrong."""
    adapter = write_adapter(tmp_path / "adapter", checkpoints("base"))
    other = changed("base", tensors=lambda t: t["model.layers.3.mlp.up_proj.weight"].add_(0.01))
    with pytest.raises(CheckpointError, match=r"is not the base that adapter .* was trained on"):
        PipoForCausalLM.from_pretrained(adapter, base=other)
    with pytest.raises(CheckpointError, match="is not the base"):
        PipoForCausalLM.from_pretrained(adapter, base=checkpoints("pipo"))
    unnamed = write_adapter(tmp_path / "unnamed", checkpoints("base"), base_fingerprint=None)
    assert PipoForCausalLM.from_pretrained(unnamed, base=other)


def test_bases_that_can_t_be_had(checkpoints: Checkpoints, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", checkpoints("pipo"))
    raw = json.loads((adapter / "adapter_config.json").read_text())
    for base, message in ((tmp_path / "gone", "If it has moved, name its place"), (adapter, "names itself")):
        (adapter / "adapter_config.json").write_text(json.dumps({**raw, "base_model_name_or_path": str(base)}))
        with pytest.raises(CheckpointError, match=message):
            PipoForCausalLM.from_pretrained(adapter)
    (adapter / "additional_config.json").write_text(json.dumps({"compressor_type": "linear"}))
    with pytest.raises(CheckpointError, match=r"compressor of type linear, its base .* one of type mlp"):
        PipoForCausalLM.from_pretrained(adapter, base=checkpoints("pipo"))
