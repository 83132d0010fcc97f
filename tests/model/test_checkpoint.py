"""Checkpoints that must load, and what a save leaves behind: every layout, every value."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3_5Config

from families import FAMILIES, PAD, base_model, config_of, pipo_model
from pipo import BaseForCausalLM, PipoConfig, PipoForCausalLM
from pipo.errors import CheckpointError, ConfigError, UnsupportedModelError
from pipo.model import files

IDS = torch.arange(1, 13)[None]
Checkpoints = Callable[..., Path]


def outputs(model: PipoForCausalLM) -> list[Tensor]:
    with torch.no_grad():
        out = model(IDS, return_logits=True)
    return [out.logits, out.mtp_logits, out.confidence_logits]


def assert_same(found: PipoForCausalLM, expected: PipoForCausalLM) -> None:
    """Same weights, buffers that no checkpoint holds included, and the same outputs, bit by bit."""
    assert found.config.compressor_type == expected.config.compressor_type
    assert found.config.pad_token_id == expected.config.pad_token_id
    ours, theirs = dict(found.named_buffers()), dict(expected.named_buffers())
    assert ours.keys() == theirs.keys()
    for name, value in [*found.state_dict().items(), *ours.items()]:
        other = theirs[name] if name in theirs else expected.state_dict()[name]
        assert torch.equal(value, other), name
    for one, other in zip(outputs(found), outputs(expected), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back(family: str, checkpoints: Checkpoints) -> None:
    """Breaks when a family's tensor, buffer or config field is lost on the way."""
    folder = checkpoints("pipo", family)
    model = PipoForCausalLM.from_pretrained(folder)
    assert not model.training
    assert_same(model, pipo_model(family))
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) != model.config.tie_word_embeddings
    assert "two tokens" in (folder / "README.md").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_checkpoint_becomes_a_pipo_model(family: str, checkpoints: Checkpoints) -> None:
    """Breaks when transformers renames or drops a tensor on load, `mtp.*` first of all."""
    base = base_model(family)
    model = PipoForCausalLM.from_base(checkpoints("base", family), compressor="linear")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in base.state_dict().items())
    assert not model.training
    again = BaseForCausalLM.from_pretrained(checkpoints("base", family))
    assert all(torch.equal(again.state_dict()[name], value) for name, value in base.state_dict().items())


@pytest.mark.parametrize("kind", ["reference", "nested"])
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_the_authors_layout_comes_back(kind: str, family: str, checkpoints: Checkpoints) -> None:
    """Breaks when a name or a config field of the authors' layout is written or read otherwise."""
    raw = json.loads((checkpoints(kind, family) / "config.json").read_text())
    assert raw["architectures"] == ["Qwen3_5MoeForCausalPIPO" if "moe" in family else "Qwen3_5ForCausalPIPO"]
    assert raw["model_type"] == (f"{family}_text" if kind == "reference" else family)
    names = load_file(checkpoints(kind, family) / "model.safetensors")
    prefix = "model." if kind == "reference" else "model.language_model."
    assert prefix + "embed_tokens.weight" in names
    assert {"mtp.fc.weight", "compressor.mlp.0.bias", "confidence_head.norm.weight"} <= set(names)
    assert_same(PipoForCausalLM.from_pretrained(checkpoints(kind, family)), pipo_model(family))


def test_a_tied_head_in_the_authors_layout(tmp_path: Path) -> None:
    """Breaks when only the outer config says that the head is tied, as a multimodal one does."""
    config = config_of("qwen3_5")
    config.tie_word_embeddings = True
    model = PipoForCausalLM(PipoConfig(config)).eval()
    model.export_reference(tmp_path, nested=True)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["text_config"]["tie_word_embeddings"], raw["text_config"]["compressor_type"]
    raw["compressor_type"] = "mlp"
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert_same(PipoForCausalLM.from_pretrained(tmp_path), model)


def test_shards_and_their_index(tmp_path: Path) -> None:
    """Breaks when a shard is not found, or files of an older save stay beside the new ones."""
    model = pipo_model("qwen3")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(PipoForCausalLM.from_pretrained(tmp_path), model)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert 1 < len(list(tmp_path.glob("model-*.safetensors"))) < len(shards)
    assert_same(PipoForCausalLM.from_pretrained(tmp_path), model)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [(None, "bfloat16"), ("auto", "bfloat16"), ("float32", "float32"), (torch.float16, "float16")],
)
def test_the_dtype_is_the_checkpoint_s_or_the_one_asked_for(asked: Any, expected: str, tmp_path: Path) -> None:
    pipo_model("qwen3_5").to(torch.bfloat16).save_pretrained(tmp_path)
    model = PipoForCausalLM.from_pretrained(tmp_path, dtype=asked)
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{expected}"}
    # Rotary frequencies are float32 at any dtype: halved, they would bend every position.
    assert {b.dtype for name, b in model.named_buffers() if "inv_freq" in name} == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=asked).dtype == model.dtype


def test_a_converted_model_s_dtype_is_what_is_saved(tmp_path: Path) -> None:
    """Breaks when the config still names the dtype of the base checkpoint: float32 weights would come back rounded."""
    base_model("qwen3").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = PipoForCausalLM.from_base(tmp_path / "base").float()
    model.save_pretrained(tmp_path / "pipo")
    assert PipoForCausalLM.from_pretrained(tmp_path / "pipo").dtype == torch.float32
    assert PipoForCausalLM.from_base(tmp_path / "base", dtype="float32").dtype == torch.float32


def test_a_model_of_one_config_builds_another(checkpoints: Checkpoints) -> None:
    """The auto classes: config, weights, attention implementation, subfolder."""
    folder = checkpoints("pipo", "qwen3")
    config = AutoConfig.from_pretrained(folder)
    assert (type(config), config.text_config.model_type, config.pad_token_id) == (PipoConfig, "qwen3", PAD)
    model = AutoModelForCausalLM.from_pretrained(folder.parent, subfolder=folder.name, attn_implementation="eager")
    assert model.model.config._attn_implementation == model.config._attn_implementation == "eager"
    torch.testing.assert_close(outputs(model), outputs(pipo_model("qwen3")))
    fresh = AutoModelForCausalLM.from_config(config)
    assert type(fresh) is PipoForCausalLM


# --- base checkpoints


def multimodal(folder: Path, family: str = "qwen3_5", tied: bool = True) -> BaseForCausalLM:
    """Write a base as Qwen3.5 is released: text part under `model.language_model.*`, a vision part, `mtp.*`."""
    text = config_of(family)
    text.tie_word_embeddings = tied
    torch.manual_seed(0)
    base = BaseForCausalLM.from_config(text)
    tensors = {
        k.replace("model.", "model.language_model.") if k.startswith("model.") else k: v
        for k, v in base.state_dict().items()
        if not (tied and k == "lm_head.weight")
    }
    tensors["model.visual.patch_embed.proj.weight"] = torch.zeros(4, 4)
    inner = {k: v for k, v in text.to_dict().items() if k != "tie_word_embeddings"}
    config = Qwen3_5Config(text_config=inner, tie_word_embeddings=tied).to_dict()
    config["text_config"].pop("tie_word_embeddings", None)
    config["architectures"] = ["Qwen3_5ForConditionalGeneration"]
    files.write_checkpoint(folder, tensors, config)
    return base.eval()


@pytest.mark.parametrize("tied", [True, False])
def test_a_multimodal_base(tied: bool, tmp_path: Path) -> None:
    """Breaks when the text part's prefix, the vision tensors, or a tie that only the outer config names get in the way."""
    base = multimodal(tmp_path, tied=tied)
    model = PipoForCausalLM.from_base(tmp_path)
    assert model.config.text_config.model_type == "qwen3_5_text"
    assert all(torch.equal(model.state_dict()[name], value) for name, value in base.state_dict().items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_a_multimodal_pipo_checkpoint_leaves_its_vision_part_out(changed: Checkpoints) -> None:
    """Vision tensors are left out where the config names a vision part, and are unexpected where it does not."""
    vision = {"model.visual.patch_embed.proj.weight": torch.zeros(4, 4)}
    folder = changed("nested", tensors=lambda t: t.update(vision), config=lambda c: c.update(vision_config={}))
    assert_same(PipoForCausalLM.from_pretrained(folder), pipo_model("qwen3_5"))
    raw = json.loads((folder / "config.json").read_text())
    del raw["vision_config"]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"unexpected: model\.visual\.patch_embed\.proj\.weight"):
        PipoForCausalLM.from_pretrained(folder)


def one_by_one(tensors: dict[str, Tensor], prefix: str = "") -> None:
    """Write fused experts as the matrices of each, as released mixtures of experts have them."""
    for name in [n for n in tensors if n.startswith(prefix) and n.endswith(("gate_up_proj", "down_proj"))]:
        if ".experts." not in name or tensors[name].dim() != 3:
            continue
        stem, _, kind = name.rpartition(".")
        for index, matrix in enumerate(tensors.pop(name)):
            parts = (
                {"down_proj": matrix}
                if kind == "down_proj"
                else dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
            )
            for part, value in parts.items():
                tensors[f"{stem}.{index}.{part}.weight"] = value.clone().contiguous()


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe", "qwen3_moe"])
def test_experts_stored_one_by_one(family: str, changed: Checkpoints) -> None:
    """Breaks when gate and up, or the order of experts, are mixed up: nothing but wrong text would show it."""
    base = base_model(family)
    model = PipoForCausalLM.from_base(changed("base", family, tensors=one_by_one))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in base.state_dict().items())
    assert_same(PipoForCausalLM.from_pretrained(changed("pipo", family, tensors=one_by_one)), pipo_model(family))


def test_experts_that_transformers_wrote(tmp_path: Path) -> None:
    """The same on a checkpoint of transformers' own hand."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config_of("qwen3_next"))
    theirs.save_pretrained(tmp_path)
    assert any(".experts.3.gate_proj.weight" in name for name in load_file(tmp_path / "model.safetensors"))
    model = PipoForCausalLM.from_base(tmp_path)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in theirs.state_dict().items())
    assert torch.equal(model.mtp.layers[0].mlp.experts.gate_up_proj, theirs.model.layers[3].mlp.experts.gate_up_proj)


def test_a_base_without_mtp_weights_gets_a_copy_of_its_last_full_attention_layer(changed: Checkpoints) -> None:
    def without_mtp(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("mtp.")]:
            del tensors[name]

    folder = changed("base", tensors=without_mtp)
    model = PipoForCausalLM.from_base(folder)
    for name, value in model.model.layers[3].state_dict().items():
        assert torch.equal(model.mtp.layers[0].state_dict()[name], value)
    assert BaseForCausalLM.from_pretrained(folder).mtp is None


@pytest.mark.parametrize("start", [PipoForCausalLM.from_base, BaseForCausalLM.from_pretrained])
def test_half_an_mtp_block_is_an_error(start: Callable[..., Any], changed: Checkpoints) -> None:
    """Breaks when the rest would be filled up silently."""
    folder = changed("base", tensors=lambda t: (t.pop("mtp.fc.weight"), t.pop("mtp.norm.weight")))
    with pytest.raises(CheckpointError, match=r"missing: mtp\.fc\.weight, mtp\.norm\.weight"):
        start(folder)


def test_the_pad_id_is_the_tokenizer_s_where_the_config_has_none(changed: Checkpoints) -> None:
    folder = changed("base", config=lambda c: c.pop("pad_token_id"))
    assert PipoForCausalLM.from_base(folder).config.pad_token_id == 2  # its end-of-text id
    added = {"added_tokens": [{"id": 5, "content": "<pad>"}]}
    (folder / "tokenizer.json").write_text(json.dumps(added))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "<pad>"}}))
    assert PipoForCausalLM.from_base(folder).config.pad_token_id == 5
    assert PipoForCausalLM.from_base(folder, pad_token_id=9).config.pad_token_id == 9
    with pytest.raises(ConfigError, match="pad_token_id 160 is not in the vocabulary"):
        PipoForCausalLM.from_base(folder, pad_token_id=160)


# --- saving


def test_a_kill_while_saving_never_leaves_half_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop at each rename in turn: the folder then holds the old model, the new one, or nothing that loads."""
    old, new = pipo_model("qwen3", seed=0), pipo_model("qwen3", seed=1)
    replace, states = os.replace, []
    for last in range(12):
        folder = tmp_path / str(last)
        old.save_pretrained(folder, max_shard_size="200KB")
        done = 0

        def stop(source: Any, target: Any, last: int = last) -> None:
            nonlocal done
            if done == last:
                raise KeyboardInterrupt
            done += 1
            replace(source, target)

        monkeypatch.setattr(files.os, "replace", stop)
        try:
            new.save_pretrained(folder, max_shard_size="200KB")
            states.append("saved")
        except KeyboardInterrupt:
            states.append("killed")
        monkeypatch.setattr(files.os, "replace", replace)
        if states[-1] == "saved":
            assert_same(PipoForCausalLM.from_pretrained(folder), new)
            break
        with pytest.raises(CheckpointError):
            PipoForCausalLM.from_pretrained(folder)
    assert "saved" in states
    assert len(states) > 4


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when the old weights are removed before the new ones are safe."""
    old, new = pipo_model("qwen3", seed=0), pipo_model("qwen3", seed=1)
    old.save_pretrained(tmp_path, max_shard_size="200KB")
    before = sorted(p.name for p in tmp_path.iterdir())
    written = 0

    def full(*arguments: Any, **options: Any) -> None:
        nonlocal written
        written += 1
        if written == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*arguments, **options)

    save = files.save_file
    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        new.save_pretrained(tmp_path, max_shard_size="200KB")
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert_same(PipoForCausalLM.from_pretrained(tmp_path), old)


def test_a_state_dict_is_saved_in_place_of_the_model_s(tmp_path: Path) -> None:
    """As a distributed trainer does, which gathers the weights itself; other processes write nothing."""
    model, other = pipo_model("qwen3_tied", seed=0), pipo_model("qwen3_tied", seed=1)
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    model.save_pretrained(tmp_path / "some", state_dict=other.state_dict(), save_function=print)
    assert_same(PipoForCausalLM.from_pretrained(tmp_path / "some"), other)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"safe_serialization": False}, "safetensors only"), ({"push_to_hub": True}, r"call model\.push_to_hub")],
)
def test_save_options_without_meaning_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        pipo_model("qwen3").save_pretrained(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_export_is_for_the_authors_families_only(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="not for 'llama'"):
        pipo_model("llama").export_reference(tmp_path)
    assert not any(tmp_path.iterdir())


def test_who_may_read_the_config_may_read_the_weights(tmp_path: Path) -> None:
    pipo_model("qwen3").save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode
