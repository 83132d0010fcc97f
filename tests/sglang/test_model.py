"""The model on SGLang's own layers: what a config can say of each family, token for token that of the reference, on one rank and on two."""

from typing import Any

import pytest

from checkpoints import expected, prompt, save_pipo
from model_runner import Job, run
from servers import KEEPING_STATES

ROPE: dict[str, Any] = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
YARN = ROPE | {"rope_type": "yarn"}
LLAMA3 = ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
MROPE = {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
MIXED = ["full_attention", "linear_attention", "full_attention", "linear_attention"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3, biases and yarn": ("qwen3", {"attention_bias": True, "rope_parameters": YARN}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True, "gate": "draft", "compressor": "linear"}),
    "llama, biases and llama3": ("llama", {"attention_bias": True, "rope_parameters": LLAMA3}),
    "llama, tied, linear scaling": ("llama", {"tie_word_embeddings": True, "rope_parameters": LINEAR, "gate": "draft"}),
    "qwen3_5, tied, mrope, half the head": ("qwen3_5", {"tie_word_embeddings": True, "rope_parameters": MROPE}),
    "qwen3_5, another order of layers": ("qwen3_5", {"layer_types": MIXED, "rope_parameters": YARN, "layout": "flat"}),
    "qwen3_5_moe": ("qwen3_5_moe", {"gate": "draft"}),
    "qwen3_5_moe, the authors', nested": ("qwen3_5_moe", {"layout": "nested", "compressor": "linear"}),
}
SPLIT = [
    "qwen3, biases and yarn",
    "llama, tied, linear scaling",
    "qwen3_5, tied, mrope, half the head",
    "qwen3_5_moe, the authors', nested",
]
PROMPTS = [prompt(1), prompt(7, seed=2), prompt(40, seed=3)]
THRESHOLDS = [0.5, 0.5, 0.0]
NUM_TOKENS = 16


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Each case's folder, and what the reference writes."""
    found = {}
    for name, (family, changes) in CASES.items():
        folder = tmp_path_factory.mktemp("model")
        model = save_pipo(folder, family, **changes)
        texts = [expected(model, ids, NUM_TOKENS, tau) for ids, tau in zip(PROMPTS, THRESHOLDS, strict=True)]
        found[name] = str(folder), texts
    return found


def written(models, names, tp_size=1):
    states = {name: KEEPING_STATES if "qwen3_5" in name else {} for name in names}
    jobs = [Job(models[name][0], PROMPTS, THRESHOLDS, NUM_TOKENS, states[name]) for name in names]
    return dict(zip(names, run(jobs, tp_size=tp_size), strict=True))


@pytest.fixture(scope="module")
def on_one_rank(models):
    return written(models, CASES)


@pytest.fixture(scope="module")
def on_two_ranks(models):
    return written(models, SPLIT, tp_size=2)


@pytest.mark.parametrize("name", CASES)
def test_what_the_reference_writes(on_one_rank, models, name):
    assert on_one_rank[name] == models[name][1]


@pytest.mark.parametrize("name", SPLIT)
def test_two_ranks_write_what_the_reference_writes(on_two_ranks, models, name):
    """Embedding, head, heads and experts are split; compressor, gate and what feeds the MTP block are whole on each."""
    assert on_two_ranks[name] == models[name][1]
