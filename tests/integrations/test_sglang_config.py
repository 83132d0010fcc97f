"""From a checkpoint's config to what SGLang runs, and what is refused on the way. It needs no SGLang."""

import json
from types import SimpleNamespace

import pytest

from families import config_of, pipo_model
from pipo import PipoConfig
from pipo.errors import CheckpointError, ConfigError, UnsupportedModelError
from pipo.integrations.sglang.arguments import OFF, SERVED, refuse_server
from pipo.integrations.sglang.config import ARCHITECTURE, backbone, for_sglang, read
from pipo.integrations.sglang.families import FAMILIES


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    pipo_model("qwen3").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nested")
    pipo_model("qwen3_5").export_reference(folder, nested=True)
    return folder


def rewritten(folder, tmp_path, **fields):
    raw = json.loads((folder / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return str(tmp_path)


def test_one_attention_layer_more_and_the_names_that_sglang_goes_by(qwen3):
    config, has_vision = read(str(qwen3), None, {})
    text = for_sglang(config)
    assert (text.num_hidden_layers, backbone(text).num_hidden_layers, has_vision) == (5, 4, False)
    assert text.architectures == [ARCHITECTURE, "Qwen3ForCausalLM"]
    assert config.text_config.num_hidden_layers == 4, "the checkpoint's own config is another object"


@pytest.mark.parametrize("layout", ["qwen3", "nested"])
def test_a_server_s_threshold(layout, request):
    folder = str(request.getfixturevalue(layout))
    assert read(folder, None, {})[0].threshold == 0.95
    assert read(folder, None, {"threshold": 0.8})[0].threshold == 0.8
    for wrong in ("0.8", None, float("nan"), [0.8]):
        with pytest.raises((ConfigError, CheckpointError), match="threshold must be a finite number"):
            read(folder, None, {"threshold": wrong})


def test_a_setting_that_is_none_is_refused(qwen3):
    """A mistyped name would be ignored, and the server would run with another threshold than it was told."""
    with pytest.raises(ConfigError, match="no setting treshold"):
        read(str(qwen3), None, {"treshold": 0.8})


@pytest.mark.parametrize("layout", ["qwen3", "nested"])
def test_the_backbone_s_settings_change_in_place(layout, request):
    """What else `text_config` says must stay."""
    folder = str(request.getfixturevalue(layout))
    before = read(folder, None, {})[0].text_config.to_dict()
    after = read(folder, None, {"text_config": {"max_position_embeddings": 64}})[0].text_config.to_dict()
    assert after == before | {"max_position_embeddings": 64}


def test_a_multimodal_base_is_known_by_its_config(nested, tmp_path):
    assert read(rewritten(nested, tmp_path, vision_config={"depth": 1}), None, {})[1]


def test_quantised_checkpoints_are_refused(qwen3, tmp_path):
    with pytest.raises(UnsupportedModelError, match="quantised"):
        read(rewritten(qwen3, tmp_path, quantization_config={"quant_method": "fp8"}), None, {})


@pytest.mark.parametrize(
    "family", ["qwen3_next", "qwen3_moe", "qwen2", "mistral", "gemma2", "gpt_oss", "cohere2", "granite"]
)
def test_other_families_are_refused_by_name(family):
    config = PipoConfig(config_of(family))
    with pytest.raises(UnsupportedModelError) as raised:
        for_sglang(config)
    assert f"{config.text_config.model_type} is not served on SGLang" in str(raised.value)
    assert all(known.model_type in str(raised.value) for known in FAMILIES)


ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "a sliding window"),
        ("qwen3", {"hidden_act": "gelu"}, "an activation other than SiLU"),
        ("qwen3", {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}, "rotary embeddings of a kind"),
        ("llama", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, "partly rotated heads"),
        ("llama", {"mlp_bias": True}, "MLP biases"),
        ("qwen3_5", {"attention_bias": True}, "attention biases"),
    ],
)
def test_what_sglang_s_layers_would_compute_otherwise_is_refused(family, changes, told):
    with pytest.raises(UnsupportedModelError, match=told):
        for_sglang(PipoConfig(config_of(family, **changes)))


def test_a_vocabulary_that_does_not_fit_into_a_pair_s_id_is_refused():
    with pytest.raises(UnsupportedModelError, match="at most 1048575"):
        for_sglang(PipoConfig(config_of("qwen3", vocab_size=1 << 20)))


# --- options of a server


def options(**changed):
    return SimpleNamespace(**{name: values[0] for name, values in SERVED.items()} | changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"pp_size": 2},
        {"speculative_algorithm": "EAGLE"},
        {"disaggregation_mode": "prefill"},
        {"quantization": "fp8"},
        {"lora_paths": ["a=b"]},
        {"load_format": "gguf"},
        {"model_impl": "transformers"},
        {"enable_dp_attention": True},
        {"attn_dp_size": 2},
        {"ep_size": 2},
        {"hicache_storage_backend": "file"},
        {"cpu_offload_gb": 4},
        {"is_embedding": True},
    ],
)
def test_options_that_are_not_served_are_refused_by_name_and_value(changed):
    ((name, value),) = changed.items()
    with pytest.raises(UnsupportedModelError) as raised:
        refuse_server(options(**changed))
    assert f"--{name.replace('_', '-')} {value}" in str(raised.value)


def test_all_of_them_at_once():
    with pytest.raises(UnsupportedModelError, match=r"--speculative-algorithm NEXTN .*--pp-size 2"):
        refuse_server(options(pp_size=2, speculative_algorithm="NEXTN"))


def test_the_front_end_that_knows_no_admission_is_refused():
    with pytest.raises(UnsupportedModelError, match="SGLANG_RUST_SERVER"):
        refuse_server(options(), rust_front_end=True)


@pytest.mark.parametrize("value", OFF)
def test_off_is_served(value):
    refuse_server(options(enable_lora=value, quantization=value, load_format="safetensors", model_impl="sglang"))
