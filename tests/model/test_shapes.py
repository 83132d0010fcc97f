"""The bundled shapes give the models that they are named after."""

from __future__ import annotations

import pytest

from pipo.errors import ConfigError
from pipo.model.shapes import SHAPES, base_without_weights, pipo_without_weights, shape_config, shape_of_checkpoint

# Parameters of the text model, a tied head counted once, as published with the checkpoints or their conversions. Those of Qwen3.5 are
# published rounded.
PUBLISHED = {
    "qwen3.5-0.8b": 0.758e9,
    "qwen3.5-2b": 1.89e9,
    "qwen3.5-4b": 4.21e9,
    "qwen3.5-9b": 8.96e9,
    "qwen3.5-27b": 26.9e9,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name: str) -> None:
    """Breaks when a width, a number of heads or a tied head is wrong."""
    model = base_without_weights(shape_config(name))
    found = sum(parameter.numel() for parameter in model.parameters())
    expected = PUBLISHED[name]
    assert found == expected if isinstance(expected, int) else found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_a_pipo_model_without_storage(name: str) -> None:
    model = pipo_without_weights(shape_config(name))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == SHAPES[name].fields["tie_word_embeddings"]


def test_a_quarter_of_the_layers_of_qwen3_5_4b_is_full_attention() -> None:
    kinds = shape_config("qwen3.5-4b").layer_types
    assert (len(kinds), kinds.count("linear_attention")) == (32, 24)


def test_names() -> None:
    assert shape_of_checkpoint("Qwen/Qwen3.5-4B") == "qwen3.5-4b"
    assert shape_of_checkpoint("Qwen/Qwen3.5-4B-Other") is None
    with pytest.raises(ConfigError, match=r"no shape 'qwen4'; the shapes are qwen3\.5-0\.8b, "):
        shape_config("qwen4")
