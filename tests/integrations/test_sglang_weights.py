"""The list that a checkpoint's tensors are ticked off on, before SGLang's layers get them. It needs no SGLang."""

import pytest
import torch

from families import pipo_model
from pipo.errors import CheckpointError
from pipo.integrations.sglang.weights import EMBEDDING, HEAD, Checklist, expected_shapes

FAMILIES = ["qwen3_5", "qwen3_5_moe", "qwen3", "qwen3_tied", "llama"]
FUSED = "model.layers.0.mlp.experts.gate_up_proj"


def stored(model, *, one_by_one=False):
    """A model's tensors as a checkpoint holds them, experts fused or one by one."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors[HEAD]
    if one_by_one:
        for name in [name for name in tensors if ".experts." in name]:
            experts, kind = name.rsplit(".", 1)
            for index, matrix in enumerate(tensors.pop(name)):
                parts = (
                    {"down_proj": matrix}
                    if kind == "down_proj"
                    else dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
                )
                tensors |= {f"{experts}.{index}.{part}.weight": tensor for part, tensor in parts.items()}
    return tensors


def passed(model, tensors, *, whole=True, has_vision=False):
    items = tensors.items() if isinstance(tensors, dict) else tensors
    checklist = Checklist(expected_shapes(model.config), tied=model.config.tie_word_embeddings, has_vision=has_vision)
    return [name for name, _ in checklist.check(items, whole=whole)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_checkpoint_passes_as_it_is(family):
    model = pipo_model(family)
    tensors = stored(model)
    assert passed(model, tensors) == list(tensors)


def test_experts_may_be_stored_one_by_one():
    model = pipo_model("qwen3_5_moe")
    tensors = stored(model, one_by_one=True)
    assert f"{FUSED.removesuffix('.gate_up_proj')}.3.up_proj.weight" in tensors
    assert passed(model, tensors) == list(tensors)


def test_the_multimodal_prefix_is_taken_off():
    model = pipo_model("qwen3_5")
    tensors = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: tensor
        for name, tensor in stored(model).items()
    }
    assert passed(model, tensors) == list(stored(model))


@pytest.mark.parametrize(
    "gone", ["mtp.fc.weight", "confidence_head.fc2.weight", "model.layers.1.mlp.up_proj.weight", EMBEDDING, HEAD]
)
def test_what_is_missing_is_named(gone):
    model = pipo_model("qwen3")
    tensors = stored(model)
    del tensors[gone]
    with pytest.raises(CheckpointError, match=f"missing: {gone}$"):
        passed(model, tensors)


def test_a_part_of_the_weights_may_come_alone_when_weights_are_updated():
    model = pipo_model("qwen3")
    assert passed(model, {"mtp.fc.weight": stored(model)["mtp.fc.weight"]}, whole=False) == ["mtp.fc.weight"]


@pytest.mark.parametrize("whole", [True, False])
def test_a_stranger_is_named_and_not_passed_on(whole):
    model = pipo_model("qwen3")
    with pytest.raises(CheckpointError, match=r"unexpected: model\.layers\.9\.input_layernorm\.weight"):
        passed(model, stored(model) | {"model.layers.9.input_layernorm.weight": torch.ones(64)}, whole=whole)


@pytest.mark.parametrize("name", ["mtp.fc.weight", "model.layers.0.self_attn.q_proj.weight", EMBEDDING])
def test_a_wrong_shape_is_named_with_the_right_one(name):
    """SGLang's own loaders take their part of a matrix that is too large."""
    model = pipo_model("qwen3")
    tensors = stored(model)
    tensors[name] = torch.cat([tensors[name], tensors[name]])
    wrong, right = tuple(tensors[name].shape), tuple(model.state_dict()[name].shape)
    with pytest.raises(CheckpointError) as raised:
        passed(model, tensors)
    assert f"misshapen: {name} {wrong} should be {right}" in str(raised.value)


def test_one_expert_less_or_misshapen_or_more_is_named():
    model = pipo_model("qwen3_5_moe")
    tensors = stored(model, one_by_one=True)
    down = "model.layers.0.mlp.experts.{}.down_proj.weight"
    tensors[down.format(9)] = tensors.pop(down.format(2))
    tensors[down.format(1)] = tensors[down.format(1)][:-1]
    with pytest.raises(CheckpointError) as raised:
        passed(model, tensors)
    for part in (f"missing: {down.format(2)}", f"unexpected: {down.format(9)}", f"misshapen: {down.format(1)}"):
        assert part in str(raised.value)


@pytest.mark.parametrize("fused_first", [True, False])
def test_experts_fused_and_one_by_one_are_stored_twice(fused_first):
    model = pipo_model("qwen3_5_moe")
    fused, single = stored(model), stored(model, one_by_one=True)
    first, second = (fused, single) if fused_first else (single, fused)
    doubled = [*first.items(), *((name, second[name]) for name in second if name not in first)]
    with pytest.raises(CheckpointError, match=r"stored twice: .*mlp\.experts"):
        passed(model, doubled)


def test_both_prefixes_are_stored_twice():
    model = pipo_model("qwen3_5")
    name = "model.layers.0.input_layernorm.weight"
    again = [("model.language_model.layers.0.input_layernorm.weight", stored(model)[name])]
    with pytest.raises(CheckpointError, match=f"stored twice: {name}"):
        passed(model, [*stored(model).items(), *again])


def test_vision_tensors_are_left_out_of_a_multimodal_base_and_strangers_elsewhere():
    model = pipo_model("qwen3_5")
    tensors = stored(model) | {"model.visual.blocks.0.norm1.weight": torch.ones(3)}
    assert passed(model, tensors, has_vision=True) == list(stored(model))
    with pytest.raises(CheckpointError, match=r"unexpected: model\.visual"):
        passed(model, tensors)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_tensors_are_refused(dtype):
    model = pipo_model("qwen3")
    tensors = stored(model)
    tensors["mtp.fc.weight"] = tensors["mtp.fc.weight"].to(dtype)
    with pytest.raises(CheckpointError, match="quantised"):
        passed(model, tensors)


def test_a_tied_head_may_be_stored_but_not_differ():
    model = pipo_model("qwen3_tied")
    tensors = stored(model)
    assert HEAD not in passed(model, tensors | {HEAD: tensors[EMBEDDING].clone()})
    with pytest.raises(CheckpointError, match="tied"):
        passed(model, tensors | {HEAD: tensors[EMBEDDING] + 1})
