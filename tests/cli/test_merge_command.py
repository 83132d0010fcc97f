"""`pipo merge`: an adapter folder, or a finished run, becomes a checkpoint beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def adapter(pipo_folder, tmp_path) -> Path:
    """An adapter on a PIPO checkpoint, as OPD leaves it in the folder of a run."""
    import torch
    from safetensors.torch import save_file

    from pipo.model.fingerprint import base_fingerprint

    folder = tmp_path / "run" / "final"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text("{}")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": str(pipo_folder)})
    )
    (folder / "additional_config.json").write_text(
        json.dumps({"compressor_type": "mlp", "base_fingerprint": base_fingerprint(pipo_folder)})
    )
    name = "base_model.model.mtp.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.rand(2, 32), f"{name}.lora_B.weight": torch.rand(32, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_a_run_is_merged_beside_its_adapter(run, adapter, pipo_folder, tmp_path):
    import torch

    from pipo import PipoForCausalLM

    result = run("merge", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    out = Path(summary["out"])
    assert out == adapter.parent / "final-merged"
    assert (summary["num_merged"], summary["num_whole"], summary["base_checked"]) == (1, 0, True)
    assert (summary["dtype"], summary["largest_rounding"], summary["tokenizer"]) == ("float32", 0.0, True)
    assert (out / "tokenizer.json").read_bytes() == (pipo_folder / "tokenizer.json").read_bytes()
    expected = PipoForCausalLM.from_pretrained(adapter).state_dict()
    merged = PipoForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert run("merge", adapter).exit_code == 2, "what was merged before is not written over"


def test_the_rounding_is_stated(run, adapter, tmp_path):
    result = run("merge", adapter, "--out", tmp_path / "low", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "Rounding to bfloat16 changed a weight by" in result.stderr
    assert "mtp.layers.0.self_attn.q_proj.weight" in result.stderr
    assert list(json.loads(run("info", tmp_path / "low", "--json").stdout)["dtypes"]) == ["bfloat16"]


def test_a_moved_base(run, adapter, pipo_folder, base_folder, tmp_path):
    raw = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**raw, "base_model_name_or_path": str(tmp_path / "gone")}))
    result = run("merge", adapter)
    assert (result.exit_code, "--base" in result.stderr) == (2, True), result.output
    result = run("merge", adapter, "--base", base_folder)
    assert (result.exit_code, "is not the base" in result.stderr) == (2, True), result.output
    assert not (adapter.parent / "final-merged").exists()
    assert run("merge", adapter, "--base", pipo_folder).exit_code == 0
    assert (adapter.parent / "final-merged" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("whole", "is a whole model already"),
        ("unfinished", "has no final/ yet"),
        ("empty", "has no adapter_config.json"),
        ("hub", "name a folder with --out"),
    ],
)
def test_what_can_t_be_merged(run, pipo_folder, adapter, tmp_path, monkeypatch, kind, message):
    folder = tmp_path / kind
    if kind == "whole":
        folder = pipo_folder
    elif kind == "hub":
        monkeypatch.setattr("pipo.model.files.find_checkpoint", lambda *_: adapter)
    else:
        folder.mkdir()
        if kind == "unfinished":
            (folder / "run.json").write_text("{}")
    result = run("merge", "owner/name" if kind == "hub" else folder)
    assert result.exit_code == 2
    assert message in result.stderr, result.stderr


def test_an_adapter_on_a_pipo_model_is_exported_in_the_authors_layout(run, golden, tmp_path):
    """An adapter of OPD, whose base is a merged model of SFT in the authors' own family."""
    import torch
    from safetensors.torch import load_file, save_file

    base = golden / "tiny-mlp-tied"
    folder, name = tmp_path / "adapter", "mtp.layers.0.mlp.down_proj.weight"
    folder.mkdir()
    before = load_file(base / "model.safetensors")[name]
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": str(base)})
    )
    (folder / "additional_config.json").write_text('{"compressor_type": "mlp"}')
    sides = {"A": torch.ones(1, before.shape[1]), "B": torch.ones(before.shape[0], 1)}
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    save_file(
        {f"{stem}.lora_{side}.weight": value for side, value in sides.items()}, folder / "adapter_model.safetensors"
    )
    assert run("export", folder, tmp_path / "out").exit_code == 0
    assert json.loads(run("info", tmp_path / "out", "--json").stdout)["kind"] == "reference"
    assert torch.allclose(load_file(tmp_path / "out" / "model.safetensors")[name], before + 1)
    result = run("merge", folder, "--layout", "reference", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["base_checked"] is False
    assert torch.allclose(load_file(tmp_path / "adapter-merged" / "model.safetensors")[name], before + 1)
