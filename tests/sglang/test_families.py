"""Greedy text of each family that is served, token for token that of the reference: layouts, compressors, gates, prompts of all lengths."""

import pytest

from checkpoints import confidences, expected, prompt
from served import QWEN3, QWEN3_5_MOE, start

ALWAYS, SOME, NEVER = 0.0, 0.5, 1.1
PROMPTS = {"one token": prompt(1), "two": prompt(2, seed=4), "odd": prompt(7, seed=2), "150": prompt(150, seed=3)}
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    with start(tmp_path_factory.mktemp("qwen3"), QWEN3) as served:
        yield served


@pytest.fixture(scope="module")
def qwen3_5_moe(tmp_path_factory):
    with start(tmp_path_factory.mktemp("qwen3_5_moe"), QWEN3_5_MOE) as served:
        yield served


@pytest.fixture(scope="module", params=["qwen3", "qwen3_5_moe", "qwen3_5", "llama"])
def case(request):
    served = request.getfixturevalue(request.param)
    served.server.forget()
    return served.model, served.server


def test_every_prompt_and_threshold_in_one_batch(case):
    """Requests with gates of their own, together: a gate that leaks into another row, or a wrong row of a cache, shows here."""
    model, server = case
    pairs = [(ids, tau) for ids in PROMPTS.values() for tau in (SOME, ALWAYS)] + [(PROMPTS["odd"], NEVER)]
    replies = server.greedy([ids for ids, _ in pairs], MAX_TOKENS, [tau for _, tau in pairs])
    assert [reply.token_ids for reply in replies] == [expected(model, ids, MAX_TOKENS, tau) for ids, tau in pairs]


def test_the_gate_of_these_models_decides_both_ways(case):
    """Otherwise the test above would not see a gate that is stuck."""
    model, _ = case
    seen = [value for ids in PROMPTS.values() for value in confidences(model, ids, MAX_TOKENS, SOME)]
    kept = sum(value >= SOME for value in seen) / len(seen)
    assert 0.15 < kept < 0.85


@pytest.mark.parametrize("name", PROMPTS)
def test_the_first_confidence_is_exact(case, name):
    """A threshold just above or below it turns the first pair: every part of MTP block and gate is right to the fourth place.

    The prompt's MTP cache is part of it: where that is not filled, the confidence is another one.
    """
    model, server = case
    ids = PROMPTS[name]
    (first,) = confidences(model, ids, 2, ALWAYS)
    kept, rejected = server.greedy([ids, ids], 2, [first - 2e-4, first + 2e-4])
    with_draft = expected(model, ids, 2, ALWAYS)
    assert kept.token_ids == with_draft
    assert rejected.token_ids == expected(model, ids, 2, NEVER)
    assert rejected.token_ids != with_draft
