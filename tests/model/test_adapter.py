"""LoRA adapter folders, as the authors release them: merged on load, exactly and strictly."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipo import PipoForCausalLM
from pipo.errors import CheckpointError, PipoError, UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
Checkpoints = Callable[..., Path]
LINEAR = [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")]
# What the paper trains in full, by full path: peft matches suffixes.
WHOLE = [
    "compressor",
    "confidence_head",
    "mtp.fc",
    "mtp.norm",
    "mtp.pre_fc_norm_hidden",
    "mtp.pre_fc_norm_embedding",
]


def assert_close(found: PipoForCausalLM, expected: Any) -> None:
    theirs = expected.state_dict()
    assert found.state_dict().keys() == theirs.keys()
    for name, value in found.state_dict().items():
        torch.testing.assert_close(
            value, theirs[name], atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def trained(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """An adapter as peft writes it after training, and peft's own merge of it."""

    def make(compressor: str = "mlp", **options: Any) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp("adapter")
        base = checkpoints("base", "qwen3_5")
        torch.manual_seed(0)
        model = PipoForCausalLM.from_base(base, compressor=compressor)
        config = LoraConfig(r=4, lora_alpha=12, target_modules=LINEAR, modules_to_save=WHOLE, **options)
        peft_model: PeftModel = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in peft_model.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                    assert "lora_" in name or any(part in name for part in WHOLE)
        peft_model.save_pretrained(folder)
        raw = json.loads((folder / "adapter_config.json").read_text())
        raw["base_model_name_or_path"] = str(base)
        (folder / "adapter_config.json").write_text(json.dumps(raw))
        (folder / "additional_config.json").write_text(json.dumps({"compressor_type": compressor}))
        return folder, peft_model.merge_and_unload()

    return make


@pytest.fixture
def adapter(trained: Callable[..., tuple[Path, Any]]) -> Path:
    """An adapter of the test's own, free to be spoilt."""
    return trained()[0]


def change(folder: Path, by: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    by(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def configure(folder: Path, name: str = "adapter_config.json", **fields: Any) -> None:
    raw = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**raw, **fields}))


@pytest.mark.parametrize("compressor", ["mlp", "linear"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"mtp.layers.0.mlp.up_proj": 7}, "alpha_pattern": {"k_proj|q_proj": 3, "q_proj": 5}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_the_merge_is_peft_s_own(compressor: str, options: dict[str, Any], trained: Callable[..., Any]) -> None:
    """Breaks when a scale, a module trained in full, or the MTP block's share of an adapter is left out."""
    folder, merged = trained(compressor, **options)
    names = list(load_file(folder / "adapter_model.safetensors"))
    assert any(n.startswith("base_model.model.model.layers.") and n.endswith("lora_A.weight") for n in names)
    assert any(n.startswith("base_model.model.mtp.layers.0.") and n.endswith("lora_B.weight") for n in names)
    model = PipoForCausalLM.from_pretrained(folder)
    assert not model.training
    assert model.config.compressor_type == compressor
    assert_close(model, merged)


def test_names_of_other_hands(trained: Callable[..., Any]) -> None:
    """The multimodal prefix, and peft's names within a process."""
    folder, merged = trained()

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            new = name.replace("base_model.model.model.", "base_model.model.model.language_model.")
            new = new.replace(".lora_A.weight", ".lora_A.default.weight")
            new = re.sub(r"\.(compressor|mtp\.fc)\.", r".\1.modules_to_save.default.", new)
            tensors[new] = tensors.pop(name)

    change(folder, rename)
    assert_close(PipoForCausalLM.from_pretrained(folder), merged)


def test_a_subfolder_another_base_and_a_dtype(adapter: Path) -> None:
    """Breaks when the adapter's own place, or the base it names, can't be overruled."""
    plain = PipoForCausalLM.from_pretrained(adapter)
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    configure(adapter, base_model_name_or_path="no/such-base")
    options: dict[str, Any] = {"subfolder": adapter.name, "base": base}
    assert_close(PipoForCausalLM.from_pretrained(adapter.parent, **options), plain)
    halved = PipoForCausalLM.from_pretrained(adapter.parent, dtype="bfloat16", **options)
    assert {p.dtype for p in halved.parameters()} == {torch.bfloat16}
    configure(adapter, base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match="names no base model; pass base="):
        PipoForCausalLM.from_pretrained(adapter)


def test_a_merged_adapter_is_a_whole_checkpoint(adapter: Path, tmp_path: Path) -> None:
    merged = PipoForCausalLM.from_pretrained(adapter)
    merged.save_pretrained(tmp_path / "merged")
    assert_close(PipoForCausalLM.from_pretrained(tmp_path / "merged"), merged)


Q = "base_model.model.model.layers.3.self_attn.q_proj"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: [t.pop(n) for n in list(t) if ".compressor." in n], r"missing: compressor\.mlp\.0\.bias"),
        (lambda t: t.pop("base_model.model.confidence_head.fc2.weight"), r"missing: confidence_head\.fc2\.weight"),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), r"missing: model\.layers\.3\.self_attn\.q_proj\.lora_B"),
        (lambda t: t.update({"base_model.model.new.weight": torch.zeros(1)}), r"unexpected: new\.weight"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 5)}), r"misshapen: .*q_proj"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(3, 64)}), r"misshapen: .*q_proj"),
        (lambda t: t.update({"base_model.model.mtp.fc.weight": torch.zeros(2, 2)}), r"misshapen: mtp\.fc\.weight"),
        (lambda t: t.update({f"{Q}.lora_B.bias": torch.zeros(128)}), r"unexpected: .*q_proj\.lora_B\.bias"),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.zeros(128)}), "unexpected: .*lora_magnitude_vector"),
    ],
)
def test_a_wrong_adapter_names_its_tensor(spoil: Callable[..., Any], message: str, adapter: Path) -> None:
    """Breaks when what an adapter lacks stays at its start, or what it has too much is dropped."""
    change(adapter, spoil)
    with pytest.raises(CheckpointError, match=message):
        PipoForCausalLM.from_pretrained(adapter)


@pytest.mark.parametrize(
    "fields",
    [{"peft_type": "IA3"}, {"use_dora": True}, {"bias": "all"}, {"init_lora_weights": "pissa_niter_4"}],
)
def test_other_kinds_of_adapters_are_refused(fields: dict[str, Any], adapter: Path) -> None:
    """Breaks when another formula is merged as if it were plain LoRA."""
    configure(adapter, **fields)
    with pytest.raises(UnsupportedModelError, match=f"not a plain LoRA adapter.*{next(iter(fields))}="):
        PipoForCausalLM.from_pretrained(adapter)


def test_unreadable_adapters_are_errors(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors can't be read"):
        PipoForCausalLM.from_pretrained(adapter)
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"it has adapter_model\.bin"):
        PipoForCausalLM.from_pretrained(adapter)
    weights.write_bytes(whole)
    for name in ("additional_config.json", "adapter_config.json"):
        text = (adapter / name).read_text()
        (adapter / name).write_text(text[:-4])
        with pytest.raises(PipoError, match=f"{name} can't be read as JSON"):
            PipoForCausalLM.from_pretrained(adapter)
        (adapter / name).write_text(text)
    configure(adapter, "additional_config.json", compressor_type="linear")
    with pytest.raises(CheckpointError, match=r"missing: compressor\.linear\.bias.*unexpected: compressor\.mlp"):
        PipoForCausalLM.from_pretrained(adapter)
