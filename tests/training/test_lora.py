"""What is trained: which weights, in what precision, and that LoRA starts from what the model was."""

import pytest
import torch

from families import FAMILIES, VOCAB, pipo_model
from pipo.errors import ConfigError
from pipo.training.config import TuningSettings
from pipo.training.lora import prepare_model, trainable_modules, trained_parameters


def slots(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(seed))


def loss_of(model, ids):
    with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        return model(ids, labels=ids).loss


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_lora_fits_every_family(family, dtype):
    """LoRA begins as the model was, and one step moves every trained weight's gradient: no part is out of reach."""
    model, ids = pipo_model(family).to(dtype), slots()
    with torch.no_grad():
        before = loss_of(model, ids)
    trainable = prepare_model(model, TuningSettings(rank=4), "sft")
    with torch.no_grad():
        after = loss_of(model, ids)
    if dtype == torch.float32:
        assert torch.equal(before, after)
    else:
        torch.testing.assert_close(before, after, rtol=2e-2, atol=0)
    model.train()
    loss_of(model, ids).backward()
    trained = dict(trained_parameters(model))
    assert all(p.dtype == torch.float32 and p.grad is not None for p in trained.values())
    assert all(p.dtype == dtype for p in model.parameters() if not p.requires_grad)
    assert sum(p.numel() for p in trained.values()) == trainable.num_trained
    assert sum(p.numel() for p in model.parameters()) == trainable.num_parameters
    assert not any("embed_tokens" in name or "lm_head" in name for name in trained)
    assert bool(trainable.not_adapted) == any(word in family for word in ("moe", "next", "gpt_oss"))


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_tied", "gpt_oss"])
def test_full_tuning_trains_all_but_embedding_and_head(family):
    model, ids = pipo_model(family).to(torch.bfloat16), slots()
    trainable = prepare_model(model, TuningSettings(method="full"), "sft")
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, labels=ids)
    assert output.backbone_hidden.dtype == output.mtp_hidden.dtype == torch.bfloat16, "the head is bfloat16"
    output.loss.backward()
    frozen = {name for name, p in model.named_parameters() if p.grad is None}
    assert frozen == {name for name, _ in model.named_parameters() if "embed_tokens" in name or "lm_head" in name}
    assert all(p.dtype == (torch.bfloat16 if n in frozen else torch.float32) for n, p in model.named_parameters())
    assert trainable.num_trained == sum(p.numel() for _, p in trained_parameters(model))


def test_which_modules_are_trained_as_in_the_paper():
    model = pipo_model("qwen3_5")
    sft = trainable_modules(model, TuningSettings(), "sft")
    opd = trainable_modules(model, TuningSettings(), "opd")
    whole = {
        "compressor",
        "confidence_head",
        "mtp.fc",
        "mtp.norm",
        "mtp.pre_fc_norm_embedding",
        "mtp.pre_fc_norm_hidden",
    }
    layer = "mtp.layers.0."
    norms = {layer + n for n in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")}
    assert set(opd.whole_modules) == whole
    assert set(sft.whole_modules) == whole | norms
    assert set(trainable_modules(model, TuningSettings(mtp_norms=False), "sft").whole_modules) == whole
    mlps = {
        f"{at}.mlp.{n}_proj"
        for at in ("mtp.layers.0", *(f"model.layers.{i}" for i in range(4)))
        for n in ("gate", "up", "down")
    }
    attention = {f"{at}.self_attn.{n}_proj" for at in ("mtp.layers.0", "model.layers.3") for n in "qkvo"}
    assert set(sft.lora_modules) == mlps | attention
    mixers = set(trainable_modules(model, TuningSettings(linear_attention=True), "sft").lora_modules) - set(
        sft.lora_modules
    )
    assert mixers == {
        f"model.layers.{i}.linear_attn.{n}"
        for i in range(3)
        for n in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
    }


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "model.embed_tokens"])
def test_what_would_untie_a_tied_head_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} can't be trained"):
        trainable_modules(pipo_model("qwen3_tied"), TuningSettings(targets=("q_proj", name)), "sft")


def test_a_target_that_names_nothing_is_refused_with_what_there_is():
    with pytest.raises(ConfigError, match=r"qkv_proj names no linear layer.*down_proj, gate_proj, k_proj"):
        trainable_modules(pipo_model("llama"), TuningSettings(targets=("qkv_proj", "o_proj")), "sft")
    with pytest.raises(ConfigError, match="no linear-attention mixers"):
        trainable_modules(pipo_model("llama"), TuningSettings(linear_attention=True), "sft")
