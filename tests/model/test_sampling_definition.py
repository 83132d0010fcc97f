"""Fast sampling against its plain definition: sorts, float64 sums over the whole vocabulary, whole numbers of Python."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipo.engine.request import SamplingParams
from pipo.losses.draft import draft_features, draft_features_of_logits
from pipo.model import blocks, sampling
from pipo.model.nucleus import UNITS, nucleus_cut
from pipo.model.sampling import (
    TOKEN1,
    SamplingBatch,
    TokenHistory,
    drawn_logprobs,
    kept_logits,
    process_logits,
    sample,
    uniform,
)

torch.set_num_threads(1)


def batch_of(*params, vocab_size, seeds=None):
    params = [replace(one, threshold=0.95) for one in params]
    return SamplingBatch.build(params, seeds or list(range(len(params))), vocab_size, "cpu")


def logits_like(kind, num_rows, vocab_size, seed):
    """Flat, peaked as a model's, of few values that tie, of two values, or mostly excluded."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, vocab_size, generator=generator)
    if kind == "peaked":
        x = x * 3
        x[:, : vocab_size // 50 + 1] += 9
    elif kind == "ties":
        x = (x * 2).round() / 2
    elif kind == "bfloat16":
        x = (x * 8).bfloat16().float()
    elif kind == "excluded":
        x = x.masked_fill(torch.rand(x.shape, generator=generator) < 0.999, -torch.inf)
        x[:, vocab_size // 3] = 1.0
    elif kind == "equal":
        x = torch.ones_like(x)
    return x[:, torch.randperm(vocab_size, generator=generator)]


KINDS = ("flat", "peaked", "ties", "bfloat16", "excluded", "equal")


# --- the definitions ----------------------------------------------------------------------------------------------------


def plain_cut(row, params):
    """The smallest logit that all filters let through, of a float32 row whose largest is 0: sorted, in float64."""
    cut = -math.inf
    if 0 < params.top_k < len(row):
        cut = float(row.sort(descending=True).values[params.top_k - 1])
    if params.top_p < 1:
        kept = row[row >= cut].double().sort(descending=True).values
        before = kept.exp().cumsum(0) - kept.exp()
        top_p = float(torch.tensor(params.top_p))  # as float32 holds it
        cut = float(kept[before < top_p * kept.exp().sum()][-1])
    return max(cut, math.log(params.min_p)) if params.min_p else cut


def plain_processed(logits, params):
    rows = []
    for row, one in zip(logits, params, strict=True):
        scaled = (row - row.max()) / (1.0 if one.greedy else one.temperature)
        rows.append(scaled if one.greedy else scaled.masked_fill(scaled < plain_cut(scaled, one), -torch.inf))
    return torch.stack(rows)


def plain_draw(row, u):
    """The token at which whole units, added up one after the other, first exceed a share `u` of their sum."""
    numbers = [int(w * UNITS) for w in row.exp().double().tolist()]
    target = int(torch.tensor(u, dtype=torch.float64) * sum(numbers))
    return next(i for i, total in enumerate(itertools.accumulate(numbers)) if total > target)


# --- filters and draws --------------------------------------------------------------------------------------------------

MIXES = {
    "top-k": [
        SamplingParams(top_k=20, top_p=0.95, temperature=0.6),
        SamplingParams(top_k=3),
        SamplingParams(top_k=7, min_p=0.1),
    ],
    "top-k and greedy": [SamplingParams(top_k=20, top_p=0.5), SamplingParams(temperature=0), SamplingParams(top_k=1)],
    "top-p": [SamplingParams(top_p=0.951, temperature=0.7), SamplingParams(top_p=0.3), SamplingParams(top_p=0.0001)],
    "all kinds": [SamplingParams(top_p=0.9, min_p=0.01), SamplingParams(top_k=5, top_p=0.8), SamplingParams(min_p=0.2)],
}


@pytest.mark.parametrize("vocab_size", [300, 16_384, 20_011])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mix", MIXES)
def test_filters_and_draws_are_those_of_the_definition(mix, kind, vocab_size):
    """A tie lost by the search in blocks, a nucleus cut one bin too far, a column taken for an id, an id of the filler."""
    params = MIXES[mix]
    logits = logits_like(kind, 3, vocab_size, seed=vocab_size)
    batch = batch_of(*params, vocab_size=vocab_size)
    expected = plain_processed(logits, params)
    found = process_logits(logits, batch)
    assert torch.equal(found, expected)
    kept = kept_logits(logits, batch)
    column = sample(kept.logits_BK, batch, 5, TOKEN1)
    u = uniform(batch.key_B, 5, TOKEN1).tolist()
    drawn = [int(e.argmax()) if p.greedy else plain_draw(e, x) for e, p, x in zip(expected, params, u, strict=True)]
    assert kept.token(column).tolist() == drawn
    assert sample(found, batch, 5, TOKEN1).tolist() == drawn
    expected_logprobs = drawn_logprobs(expected, batch, torch.tensor(drawn))
    torch.testing.assert_close(drawn_logprobs(kept.logits_BK, batch, column), expected_logprobs, atol=1e-5, rtol=1e-5)


def test_with_top_k_few_tokens_are_worked_on():
    """And all of them where so many tie at the cut that they may stand anywhere, or where a row has no top-k."""
    batch = batch_of(SamplingParams(top_k=20), SamplingParams(temperature=0), vocab_size=20_000)
    assert kept_logits(logits_like("flat", 2, 20_000, 0), batch).logits_BK.shape == (2, 20)
    assert kept_logits(logits_like("equal", 2, 20_000, 0), batch).ids_BK is None
    open_batch = batch_of(SamplingParams(top_k=20), SamplingParams(), vocab_size=20_000)
    assert kept_logits(logits_like("flat", 2, 20_000, 0), open_batch).ids_BK is None


def test_the_nucleus_of_real_sizes():
    """Sums over 151,936 flat probabilities, where a logit is worth 1e-6 of the mass, place the cut among equal neighbours only."""
    logits = logits_like("flat", 2, 151_936, 3)
    logits -= logits.amax(-1, keepdim=True)
    top_p = torch.tensor([0.95, 0.5])
    cut = nucleus_cut(logits, top_p)
    for row, found, wanted in zip(logits, cut, top_p, strict=True):
        weights = row.double().exp()
        share = weights / weights.sum()
        assert (row == found).any()
        assert share[row > found].sum() < wanted.double() + 1e-8
        assert share[row >= found].sum() > wanted.double() - 1e-8


def test_draws_follow_the_softmax():
    """Weights relative to the likeliest token are the probabilities, up to a factor: the token is the one that sums of float64
    probabilities give."""
    logits = logits_like("peaked", 1, 5000, 1)
    processed = (logits - logits.max()).expand(2000, -1)
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    cumulated = processed[0].double().softmax(-1).cumsum(-1)
    assert torch.equal(sampling._draw(processed.exp(), u), torch.searchsorted(cumulated, u, right=True))


def test_a_row_that_is_not_finite_draws_some_token_of_the_vocabulary():
    """Its token means nothing, but an id beyond the vocabulary would end the process on a GPU."""
    logits = torch.full((3, 1000), torch.nan)
    logits[1] = -torch.inf
    logits[2, 5] = torch.inf
    for params in ([SamplingParams()] * 3, [SamplingParams(top_p=0.5)] * 3, [SamplingParams(top_k=2)] * 3):
        batch = batch_of(*params, vocab_size=1000)
        kept = kept_logits(logits, batch)
        tokens = kept.token(sample(kept.logits_BK, batch, 0, TOKEN1))
        assert ((tokens >= 0) & (tokens < 1000)).all()


# --- blocks -------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 6000), st.integers(0, 12), st.sampled_from(KINDS), st.integers(0, 99))
def test_largest_and_argmax(num_rows, vocab_size, k, kind, seed):
    """A block that is left out, the filler of the last block, or another than the first of ties."""
    values = logits_like(kind, num_rows, vocab_size, seed)
    found = blocks.largest(values, k)
    expected = values.topk(min(k, vocab_size)).values
    assert torch.equal(found.values_BK, expected)
    if kind != "excluded":
        assert torch.equal(values.gather(1, found.ids_BK), expected)
        assert all(len(set(ids)) == len(ids) for ids in found.ids_BK.tolist())
    assert torch.equal(blocks.argmax(values), values.argmax(-1))


# --- penalties ----------------------------------------------------------------------------------------------------------


def test_penalties_of_some_rows_leave_the_others_alone():
    """All rows penalised and some of them go different ways."""
    some = SamplingParams(presence_penalty=1.5, frequency_penalty=0.25)
    logits = logits_like("peaked", 3, 600, 2)
    outputs = [[1, 1, 7], [2], [3, 4]]

    def processed(params):
        batch = batch_of(*params, vocab_size=600)
        history = TokenHistory(batch, [[0]] * 3, outputs)
        history.add(torch.tensor([9, 9, 9]), torch.tensor([True, False, True]))
        return process_logits(logits, batch, history)

    everywhere, nowhere = processed([some] * 3), processed([SamplingParams()] * 3)
    mixed = processed([some, SamplingParams(), some])
    assert torch.equal(mixed, torch.stack([everywhere[0], nowhere[1], everywhere[2]]))
    assert (everywhere != nowhere).any(-1).all()


# --- what the gate sees -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_gate_sees_at_decoding_what_it_was_trained_on(kind):
    """Training makes the features of log-probabilities, decoding of logits; excluded tokens, −inf, must not make NaN of them."""
    logits = logits_like(kind, 4, 3000, 7)
    drafts = logits.topk(3).indices[:, 2]
    log_probs = logits.log_softmax(-1)
    expected = draft_features(log_probs, log_probs.gather(1, drafts[:, None])[:, 0])
    found = draft_features_of_logits(logits, drafts, blocks.largest(logits, 2).values_BK)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
