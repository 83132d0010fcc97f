"""`pipo info` names what a checkpoint is, and everything that is wrong with it."""

import json
import shutil

import pytest


def report_of(run, folder, exit_code=0):
    result = run("info", str(folder), "--json")
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("name", "tied", "compressor"), [("tiny-mlp-tied", True, "mlp"), ("tiny-linear-untied", False, "linear")]
)
def test_the_authors_layout(run, golden, name, tied, compressor):
    report = report_of(run, golden / name)
    assert (report["kind"], report["family"], report["sound"]) == ("reference", "qwen3_5_text", True)
    assert (report["tied"], report["compressor"], report["has_mtp"]) == (tied, compressor, True)
    assert ("head" in report["num_parameters"]) == (not tied)
    assert report["dtypes"] == {"float32": sum(report["num_parameters"].values())}


def test_our_layout(run, pipo_folder):
    report = report_of(run, pipo_folder)
    assert (report["kind"], report["family"], report["has_tokenizer"]) == ("pipo", "qwen3", True)
    assert list(report["num_parameters"]) == ["embedding", "backbone", "compressor", "mtp", "confidence_head"]


def test_a_base_model(run, base_folder):
    report = report_of(run, base_folder)
    assert (report["kind"], report["has_mtp"], report["compressor"], report["sound"]) == ("base", True, None, True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("mtp.fc.weight"), "missing: mtp.fc.weight"),
        (lambda t: t.update({"extra.weight": t["mtp.fc.weight"].clone()}), "unexpected: extra.weight"),
        (lambda t: t.update({"mtp.fc.weight": t["mtp.fc.weight"][:, :5].clone()}), "mtp.fc.weight (32, 5)"),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), "model.norm.weight holds NaN"),
        (lambda t: t["confidence_head.fc2.weight"].fill_(float("inf")), "confidence_head.fc2.weight holds NaN or inf"),
    ],
    ids=["missing", "unexpected", "misshapen", "nan", "infinity"],
)
def test_an_unsound_checkpoint(run, broken, change, says):
    report = report_of(run, broken(change), exit_code=1)
    assert not report["sound"]
    assert says in report["problems"][0]
    assert len(report["problems"]) == 1


def test_people_read_the_same(run, pipo_folder, broken):
    assert "sound" in run("info", str(pipo_folder)).stdout
    result = run("info", str(broken(lambda t: t.pop("mtp.fc.weight"))))
    assert result.exit_code == 1
    assert "missing: mtp.fc.weight" in result.stdout


def test_a_truncated_file_is_an_error(run, pipo_folder, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(pipo_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    result = run("info", str(folder))
    assert result.exit_code == 2
    assert "model.safetensors can't be read" in result.stderr


def test_an_adapter(run, tmp_path):
    import torch
    from safetensors.torch import save_file

    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "base_model_name_or_path": "some/base"}'
    )
    (tmp_path / "additional_config.json").write_text('{"compressor_type": "mlp"}')
    tensors = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 4)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert "lora_B" in report_of(run, tmp_path, exit_code=1)["problems"][0]
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"] = torch.ones(4, 2)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    report = report_of(run, tmp_path)
    assert (report["kind"], report["base"], report["compressor"]) == ("adapter", "some/base", "mlp")


@pytest.mark.parametrize("name", ["no/such/place/at-all", "."])
def test_no_checkpoint(run, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("info", name)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
