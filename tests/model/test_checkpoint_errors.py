"""Checkpoints that must not load: each error says which file or tensor is wrong, and nothing is filled up instead."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    Gemma3nTextConfig,
    GPT2Config,
    GPTNeoXConfig,
    MambaConfig,
    MiniMaxConfig,
    PreTrainedConfig,
    T5Config,
)

from families import pipo_model
from pipo import BaseForCausalLM, PipoConfig, PipoForCausalLM
from pipo.errors import CheckpointError, ConfigError, UnsupportedModelError

Checkpoints = Callable[..., Path]
LOADERS: dict[str, Callable[..., Any]] = {
    "pipo": PipoForCausalLM.from_pretrained,
    "reference": PipoForCausalLM.from_pretrained,
    "nested": PipoForCausalLM.from_pretrained,
    "base": PipoForCausalLM.from_base,
}
KINDS = list(LOADERS)


def refused(kind: str, folder: Path, message: str, error: type[Exception] = CheckpointError) -> None:
    with pytest.raises(error, match=message) as raised:
        LOADERS[kind](folder)
    assert str(folder) in str(raised.value)
    if kind == "base":
        with pytest.raises(error, match=message):
            BaseForCausalLM.from_pretrained(folder)


def key(kind: str, name: str) -> str:
    return name.replace("model.", "model.language_model.") if kind == "nested" else name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "mtp.pre_fc_norm_hidden.weight"])
def test_a_missing_tensor_is_named(kind: str, name: str, changed: Checkpoints) -> None:
    folder = changed(kind, tensors=lambda t: t.pop(key(kind, name)))
    refused(kind, folder, "missing: .*" + name.replace(".", r"\."))


@pytest.mark.parametrize("name", ["compressor.mlp.2.bias", "confidence_head.fc2.weight", "lm_head.weight"])
@pytest.mark.parametrize("kind", ["pipo", "nested"])
def test_a_part_is_never_taken_for_absent(kind: str, name: str, changed: Checkpoints) -> None:
    """Breaks when a compressor, gate or head that is not there is started afresh."""
    refused(kind, changed(kind, tensors=lambda t: t.pop(name)), f"missing: {name}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["model.layers.9.mlp.up_proj.weight", "mtp.layers.1.mlp.up_proj.weight", "new.thing"])
def test_an_unexpected_tensor_is_named(kind: str, name: str, changed: Checkpoints) -> None:
    folder = changed(kind, tensors=lambda t: t.update({key(kind, name): torch.zeros(2)}))
    refused(kind, folder, "unexpected: .*" + name.replace(".", r"\."))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "mtp.fc.weight"])
def test_a_misshapen_tensor_is_named(kind: str, name: str, changed: Checkpoints) -> None:
    folder = changed(kind, tensors=lambda t: t.update({key(kind, name): torch.zeros(3, 5)}))
    refused(kind, folder, "misshapen: .*" + name.replace(".", r"\."))


def test_every_wrong_tensor_is_in_one_message(changed: Checkpoints) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        del tensors["mtp.fc.weight"], tensors["model.norm.weight"]
        tensors["extra"] = torch.zeros(1)

    refused(
        "pipo", changed("pipo", tensors=spoil), r"missing: model\.norm\.weight, mtp\.fc\.weight; unexpected: extra$"
    )


def test_a_tensor_stored_twice_is_named(changed: Checkpoints) -> None:
    """Breaks when one of two prefixes silently wins."""
    folder = changed("pipo", tensors=lambda t: t.update({"model.language_model.norm.weight": torch.zeros(64)}))
    refused("pipo", folder, r"stored twice: model\.norm\.weight")


@pytest.mark.parametrize("change", ["lost", "odd", "twice"])
@pytest.mark.parametrize(
    ("kind", "layer"), [("pipo", "mtp.layers.0"), ("base", "mtp.layers.0"), ("base", "model.layers.1")]
)
def test_experts_one_by_one_must_be_whole(kind: str, layer: str, change: str, changed: Checkpoints) -> None:
    """Breaks when an expert that is not there, or does not fit, is not noticed."""
    fused = f"{layer}.mlp.experts.down_proj"

    def spoil(tensors: dict[str, Any]) -> None:
        whole = tensors[fused] if change == "twice" else tensors.pop(fused)
        for i, matrix in enumerate(whole):
            if not (change == "lost" and i == 1):
                value = matrix[:3] if change == "odd" and i == 2 else matrix
                tensors[f"{fused.removesuffix('.down_proj')}.{i}.down_proj.weight"] = value.clone()

    says = {
        "lost": r"expert 1 down_proj|misshapen: .*down_proj",
        "odd": "differ in shape|do not fit each other",
        "twice": "stored twice: ",
    }
    refused(kind, changed(kind, "qwen3_5_moe", tensors=spoil), says[change])


def test_quantised_weights_are_refused(changed: Checkpoints) -> None:
    """Breaks when int8 numbers are copied in as if they were weights."""
    folder = changed("pipo", tensors=lambda t: t.update({"mtp.fc.weight": t["mtp.fc.weight"].to(torch.int8)}))
    refused("pipo", folder, r"mtp\.fc\.weight is torch\.int8; quantised")


def test_a_tied_checkpoint_with_another_head_is_refused(changed: Checkpoints) -> None:
    """Breaks when the head overwrites the embedding, or is dropped."""
    folder = changed("pipo", "qwen3_tied", tensors=lambda t: t.update({"lm_head.weight": torch.zeros(160, 64)}))
    refused("pipo", folder, r"tied to the embedding, but stores another lm_head\.weight")
    same = lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})  # noqa: E731
    shutil.rmtree(folder)
    model = PipoForCausalLM.from_pretrained(changed("pipo", "qwen3_tied", tensors=same))
    assert model.lm_head.weight is model.model.embed_tokens.weight


# --- files


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, 6, 3000, -1])
def test_a_truncated_file_is_an_error(kind: str, size: int, changed: Checkpoints) -> None:
    folder = changed(kind)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    refused(kind, folder, r"model\.safetensors can't be read as safetensors")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "weights.pt"])
def test_a_pickle_is_never_read(kind: str, name: str, changed: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = changed(kind)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x04cos\nsystem\n.")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    refused(kind, folder, f"it has {name}. Only safetensors are read")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    pipo_model("qwen3").save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    return tmp_path / "sharded"


def _no_map(index: dict[str, Any]) -> None:
    del index["weight_map"]


def _lost_shard(index: dict[str, Any]) -> None:
    index["weight_map"]["mtp.fc.weight"] = "model-00099-of-00099.safetensors"


def _outside(index: dict[str, Any]) -> None:
    index["weight_map"]["mtp.fc.weight"] = "../elsewhere.safetensors"


def _elsewhere(index: dict[str, Any]) -> None:
    shards = sorted(set(index["weight_map"].values()))
    here = index["weight_map"]["mtp.fc.weight"]
    index["weight_map"]["mtp.fc.weight"] = next(shard for shard in shards if shard != here)


def _unlisted(index: dict[str, Any]) -> None:
    del index["weight_map"]["mtp.fc.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_no_map, "has no weight_map"),
        (_lost_shard, r"model-00099-of-00099\.safetensors can't be read"),
        (_outside, r"shards outside its folder: \.\./elsewhere\.safetensors"),
        (_elsewhere, r"not in its shard: mtp\.fc\.weight"),
        (_unlisted, r"not in the index: mtp\.fc\.weight"),
    ],
)
def test_a_wrong_index_is_an_error(change: Callable[[dict[str, Any]], None], message: str, sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))
    refused("pipo", sharded, message)


def test_a_corrupt_index_or_lost_shard_is_an_error(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    whole = index.read_text()
    index.write_text(whole[:100])
    refused("pipo", sharded, r"index\.json can't be read as JSON")
    index.write_text(whole)
    (sharded / "model-00002-of-00004.safetensors").unlink(missing_ok=True)
    next(iter(sorted(sharded.glob("model-*.safetensors")))).unlink()
    refused("pipo", sharded, r"model-0000\d-of-0000\d\.safetensors can't be read")


# --- configs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["", "{", "[1]", '"pipo"', "\udcff"])
def test_an_unreadable_config_is_an_error(kind: str, text: str, changed: Checkpoints) -> None:
    folder = changed(kind)
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(kind, folder, r"config\.json (can't be read as JSON|should hold a JSON object)")
    (folder / "config.json").unlink()
    refused(kind, folder, r"has no config\.json")


def _inner(raw: dict[str, Any]) -> dict[str, Any]:
    return dict(raw.get("text_config", raw))


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        raw.get("text_config", raw)[name] = value

    return change


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_size", "wide", r"config\.json can't be used: .*hidden_size"),
        ("layer_types", ["full_attention"], r"config\.json can't be used: .*layer_types"),
        ("hidden_size", 32, "misshapen: |can't be loaded|can't be used"),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(
    kind: str, name: str, value: Any, message: str, changed: Checkpoints
) -> None:
    """Breaks when what transformers raises reaches the user raw, or a size is taken from elsewhere."""
    refused(kind, changed(kind, config=_set(name, value)), message)


def test_configs_that_say_too_little_or_too_much(changed: Checkpoints) -> None:
    for config, message, error in (
        (lambda c: c.pop("text_config"), "has no text_config", CheckpointError),
        (lambda c: c["text_config"].pop("model_type"), "no model_type", ConfigError),
        (_set("model_type", "nonsense"), "does not know the family 'nonsense'", UnsupportedModelError),
        (lambda c: c.update(compressor_type="conv"), "compressor_type must be one of mlp, linear", ConfigError),
        (lambda c: c.update(compressor_type="linear"), r"missing: compressor\.linear\.bias", CheckpointError),
        (lambda c: c.update(pad_token_id=160), "pad_token_id 160 is not in the vocabulary", ConfigError),
    ):
        folder = changed("pipo", config=config)
        with pytest.raises(error, match=message):
            PipoForCausalLM.from_pretrained(folder)
        shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="one MTP layer, this one 2"):
        PipoForCausalLM.from_pretrained(changed("nested", config=_set("mtp_num_hidden_layers", 2)))


def test_unreadable_generation_defaults_are_an_error(changed: Checkpoints) -> None:
    """Breaks when such a file is taken for an absent one: the model would sample with other settings."""
    folder = changed("pipo", "qwen3")
    (folder / "generation_config.json").write_text('{"temperature": 0.6')
    refused("pipo", folder, r"generation_config\.json can't be read as JSON")


def test_a_checkpoint_of_the_other_kind_is_refused(checkpoints: Checkpoints) -> None:
    """The message says what to do with it."""
    refused("pipo", checkpoints("base", "qwen3_5"), "regular qwen3_5_text checkpoint.*from_base or `pipo init`")
    for kind in ("pipo", "reference", "nested"):
        refused("base", checkpoints(kind, "qwen3_5"), "is a PIPO checkpoint already")


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust_remote_code": True}, "none is ever run"),
        ({"device_map": "auto", "quantization": 4}, "does not know device_map, quantization"),
        ({"dtype": "int4"}, "dtype must be one of float32, bfloat16, float16, got 'int4'"),
        ({"base": "some/base"}, "is a whole checkpoint, not an adapter"),
    ],
)
def test_options_without_meaning_are_refused(options: dict[str, Any], message: str, checkpoints: Checkpoints) -> None:
    with pytest.raises(ConfigError, match=message):
        PipoForCausalLM.from_pretrained(checkpoints("pipo", "qwen3"), **options)


@pytest.mark.parametrize("start", [PipoForCausalLM.from_base, BaseForCausalLM.from_pretrained])
def test_base_options_without_meaning_are_refused(start: Callable[..., Any], checkpoints: Checkpoints) -> None:
    for options in ({"trust_remote_code": True}, {"device_map": "auto"}):
        with pytest.raises(ConfigError, match="does not know " + next(iter(options))):
            start(checkpoints("base", "qwen3"), **options)
    with pytest.raises(ConfigError, match="compressor_type must be one of"):
        PipoForCausalLM.from_base(checkpoints("base", "qwen3"), compressor="conv")


def test_a_code_bearing_checkpoint_is_opened_without_its_code(changed: Checkpoints) -> None:
    """Breaks when `auto_map` makes transformers import a file of the checkpoint, or ask whether it may."""
    folder = changed("base", "qwen3", config=lambda c: c.update(auto_map={"AutoModelForCausalLM": "evil.Model"}))
    (folder / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")
    assert PipoForCausalLM.from_base(folder).config.text_config.model_type == "qwen3"
    raw = json.loads((folder / "config.json").read_text())
    raw.update(model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UnsupportedModelError, match="does not know the family 'evil'"):
        PipoForCausalLM.from_base(folder)


# --- families

_SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2}
REFUSED = {
    "gpt2": (GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2), "positions are added inside the decoder"),
    "bert": (BertConfig(**_SIZES), "it is an encoder"),
    "t5": (T5Config(vocab_size=64, d_model=16), "it is an encoder-decoder"),
    "minimax": (MiniMaxConfig(**_SIZES), "cache of its own kind"),
    "mamba": (MambaConfig(**_SIZES), "no attention layer"),
    "gemma3n_text": (Gemma3nTextConfig(vocab_size=64), "per-layer embeddings"),
    "gpt_neox": (GPTNeoXConfig(**_SIZES, num_attention_heads=2, intermediate_size=16), "no `norm`"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_does_not_fit_is_refused_by_name(family: str, tmp_path: Path, checkpoints: Checkpoints) -> None:
    """Breaks when such a family is built all the same: it would run, and mean nothing."""
    config: PreTrainedConfig = REFUSED[family][0]
    message = f"does not support the family '{family}': .*{REFUSED[family][1]}"
    with pytest.raises(UnsupportedModelError, match=message):
        PipoForCausalLM(PipoConfig(config, pad_token_id=0))
    if family == "gpt_neox":
        return
    shutil.copy(checkpoints("base", "qwen3") / "model.safetensors", tmp_path)
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=message):
        PipoForCausalLM.from_base(tmp_path)
