"""The cost model: the issue's own figures, and counts that can be done by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from families import FAMILIES, config_of
from pipo.bench.cost import COST_METHODS, Machine, StepCost, decode_cost, prefill_cost
from pipo.bench.sizes import Attention, ModelSizes, Weights, model_sizes
from pipo.errors import ConfigError
from pipo.model.base import BaseForCausalLM
from pipo.model.config import PipoConfig
from pipo.model.modeling import PipoForCausalLM
from pipo.model.shapes import pipo_without_weights, shape_config

H200 = Machine("h200", bytes_per_s=4.8e12, flops_per_s=0.989e15, memory_bytes=141e9)


@pytest.fixture(scope="module")
def small() -> ModelSizes:
    return model_sizes(shape_config("qwen3-0.6b"))


@pytest.fixture(scope="module")
def hybrid() -> ModelSizes:
    return model_sizes(shape_config("qwen3.5-4b"))


def ceiling(sizes, batch, context, machine, **settings):
    return machine.ceiling(
        decode_cost(sizes, "pipo", batch, context, **settings), decode_cost(sizes, "regular", batch, context)
    )


def test_ceilings_of_the_small_model(small):
    """1.58 holds the cache of 512 tokens; weights alone allow 1.53. A second head of 32K rows and the same cache: 1.86."""
    reader = Machine("reads only", 1.0, 1e30, 1e12)
    assert ceiling(small, 1, 0, reader) == pytest.approx(1.533, abs=1e-3)
    assert ceiling(small, 1, 512, reader) == pytest.approx(1.577, abs=1e-3)
    assert ceiling(small, 1, 512, reader, draft_vocab=32_768) == pytest.approx(1.864, abs=1e-3)


@pytest.mark.parametrize(("context", "ratio"), [(512, 1.955), (2048, 2.123)])
def test_operations_of_a_prefill(small, context, ratio):
    """Above 2 where attention over half the positions, a quarter of the products, outweighs MTP block and compressor."""
    regular, pipo = (prefill_cost(small, method, 1, context).flops for method in ("regular", "pipo"))
    assert regular / pipo == pytest.approx(ratio, abs=1e-3)


@pytest.mark.parametrize(
    ("batch", "context", "expected"),
    [(1, 4096, 1.663), (1, 131_072, 2.001), (32, 32_768, 2.750), (256, 4096, 2.417)],
)
def test_ceilings_of_the_hybrid_on_a_gpu(hybrid, batch, context, expected):
    """Issue 7's 1.6, 2.0, 2.7 and 2.4. They hold float32 linear-attention states, read and written by each step."""
    assert ceiling(hybrid, batch, context, H200, commit=0.95) == pytest.approx(expected, abs=1e-3)


def test_regular_bytes_by_hand(small):
    """Each weight but the norms' counted here is read once; keys and values of 28 layers, 8 heads of 128, in two bytes."""
    layer = 1024 * 2048 * 2 + 1024 * 1024 * 2 + 3 * 1024 * 3072 + 2 * 1024 + 2 * 128
    parameters = 28 * layer + 1024 + 151_936 * 1024
    cost = decode_cost(small, "regular", batch=3, context=99)
    assert cost.weight_bytes == 2 * (parameters + 3 * 1024)
    assert cost.cache_bytes == 3 * 100 * 28 * 2 * 8 * 128 * 2
    assert cost.flops == 3 * (2 * parameters + 28 * 100 * 16 * 128 * 4)
    assert cost.num_tokens == 1


def test_bytes_follow_the_number_formats(small):
    low = decode_cost(small, "pipo", 2, 64, weight_bytes_per=1, cache_bytes_per=1)
    high = decode_cost(small, "pipo", 2, 64)
    assert (2 * low.weight_bytes, 2 * low.cache_bytes, low.flops) == (high.weight_bytes, high.cache_bytes, high.flops)


def test_quantised_layers_alone(small):
    """Backbone and MTP block in one byte; heads, compressor, confidence head and embeddings in two."""
    layers = decode_cost(small, "pipo", 1, 64, weight_bytes_per=1, other_bytes_per=2)
    all_wide = decode_cost(small, "pipo", 1, 64)
    assert all_wide.weight_bytes - layers.weight_bytes == small.backbone.dense + small.mtp.dense


def test_the_second_head_is_read_where_some_row_commits(small):
    """One row: with probability a. Four rows: nearly always. No commits: never, and the MTP block still is."""
    head = small.head.dense * 2

    def extra(batch, commit):
        some, none = (decode_cost(small, "pipo", batch, 64, commit=value) for value in (commit, 0))
        return (some.weight_bytes - none.weight_bytes) / head, (some.flops - none.flops) / head

    assert extra(1, 0.5) == pytest.approx((0.5, 0.5))
    assert extra(4, 0.5) == pytest.approx((1 - 0.5**4, 2.0))
    assert decode_cost(small, "pipo", 4, 64, commit=0.5).num_tokens == 1.5
    none = decode_cost(small, "pipo", 1, 64, commit=0)
    assert none.weight_bytes > decode_cost(small, "regular", 1, 64).weight_bytes + 2 * small.mtp.dense


def test_speculative_reads_weights_once_for_two_tokens(small):
    """Batch by batch it reads about what PIPO does, computes twice as much, and holds twice the cache."""
    speculative, pipo = (decode_cost(small, method, 1, 1024) for method in ("speculative", "pipo"))
    assert speculative.weight_bytes == pytest.approx(pipo.weight_bytes, rel=0.02)
    assert speculative.cache_bytes == pytest.approx(2 * pipo.cache_bytes, rel=0.01)
    assert speculative.flops > 1.7 * pipo.flops


def test_states_are_read_and_written(hybrid):
    """24 linear layers of 32 heads of 128 × 128 in float32 and their convolutions, whatever the context."""
    states = 24 * (32 * 128 * 128 * 4 + 8192 * 4 * 2)
    assert hybrid.state_bytes == states
    one, two = (decode_cost(hybrid, "regular", batch, 0).cache_bytes for batch in (1, 2))
    assert two - one == 2 * states + 8 * 2 * 4 * 256 * 2


def test_windows_limit_what_is_seen():
    """A query sees itself and what is within the window; over a prompt that is a trapezium, counted one by one here."""
    layer = Attention(entries=1, flops=1, window=8)
    for length in (1, 7, 8, 9, 30):
        assert layer.seen_in(length) == sum(layer.seen(position) for position in range(length))
    assert Attention(1, 1).seen_in(30) == 30 * 31 / 2


def test_experts_that_are_read():
    """Two tokens that each take 2 of 8 experts touch 3.5 in expectation, and are multiplied with 2 each."""
    weights = Weights(dense=0, experts=800, expert_share=0.25)
    assert weights.read_by(1) == 200 == weights.per_position
    assert weights.read_by(2) == pytest.approx(350)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_sizes(family):
    """Nothing is counted twice or forgotten, tied heads and experts included."""
    config = config_of(family)
    sizes, model = model_sizes(config), pipo_without_weights(config)
    assert sum(sizes.held("pipo")) == sum(parameter.numel() for parameter in model.parameters())
    assert sizes.backbone.per_position <= sizes.backbone.read_by(3) <= sizes.backbone.dense + sizes.backbone.experts
    for method in COST_METHODS:
        assert decode_cost(sizes, method, 2, 20).flops > 0 < prefill_cost(sizes, method, 2, 20).flops


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma2", "cohere2"])
def test_operations_are_those_of_the_real_forward(family):
    """Against torch's own count of matrix products in a forward: it does not see norms and biases, a few per cent of so small a model."""
    config = config_of(family)
    sizes = model_sizes(config)
    torch.manual_seed(0)
    ids = torch.randint(3, 100, (1, 2))
    for method, model in (
        ("regular", BaseForCausalLM.from_config(config, mtp=False)),
        ("pipo", PipoForCausalLM(PipoConfig(config))),
    ):
        cost = prefill_cost(sizes, method, 1, 2 if method == "pipo" else 1)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            if method == "regular":
                model.head(model.run_backbone(model.embed(ids[:, :1]))[0])
            else:
                hidden, call = model.run_backbone(model.compress(ids))
                mtp_hidden = model.run_mtp(ids[:, :1], hidden, call)
                model.confidence(hidden, mtp_hidden)
                model.head(hidden), model.head(mtp_hidden)
        counted = counter.get_total_flops()
        assert counted <= cost.flops
        assert counted == pytest.approx(cost.flops, rel=0.04)


def test_floors_are_the_slower_of_reading_and_computing():
    machine = Machine("m", bytes_per_s=10, flops_per_s=100, memory_bytes=0, overhead_s=0.5)
    assert machine.floor_s(StepCost(2, 20, 10, 100)) == 3.5
    assert machine.token_floor_s(StepCost(2, 20, 10, 900)) == 4.75


@pytest.mark.parametrize(
    ("arguments", "settings", "named"),
    [
        (("greedy", 1, 1), {}, "regular, speculative, pipo"),
        (("pipo", 0, 1), {}, "batch 0"),
        (("pipo", 1, 1), {"commit": 1.5}, "1.5"),
        (("pipo", 1, 1), {"draft_vocab": 151_937}, "151,936"),
    ],
)
def test_bad_arguments_are_named(small, arguments, settings, named):
    with pytest.raises(ConfigError, match=named):
        decode_cost(small, *arguments, **settings)
    with pytest.raises(ConfigError, match=named):
        prefill_cost(small, *arguments, **settings)


def test_an_empty_prompt_is_refused(small):
    with pytest.raises(ConfigError, match="at least one token"):
        prefill_cost(small, "regular", 1, 0)
