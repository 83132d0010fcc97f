"""Penalties, biases and filters against naive per-row references: each test says what breaks if it fails."""

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipo.engine.request import SamplingParams
from pipo.model.sampling import (
    TOKEN1,
    VERIFY,
    SamplingBatch,
    TokenHistory,
    probabilities,
    process_logits,
    sample,
    speculative_verify,
    token_logprobs,
    uniform,
)

torch.set_num_threads(1)


def batch_of(*params, vocab_size=16, seeds=None, stop_ids=None, device="cpu"):
    # The engine has put the checkpoint's threshold in the place of None by then.
    params = [replace(one, threshold=0.95) if one.threshold is None else one for one in params]
    return SamplingBatch.build(params, seeds or list(range(len(params))), vocab_size, device, stop_ids)


# --- naive references: one row, plain numbers --------------------------------------------------------


def naive_adjusted(logits, params, prompt=(), output=(), stop_ids=()):
    counts, row = Counter(output), list(logits)
    for token in range(len(row)):
        if token in counts or token in prompt:
            r = params.repetition_penalty
            row[token] = row[token] / r if row[token] > 0 else row[token] * r
        row[token] -= params.frequency_penalty * counts[token] + params.presence_penalty * (counts[token] > 0)
        row[token] += (params.logit_bias or {}).get(token, 0.0)
        if token in stop_ids and len(output) < params.min_tokens:
            row[token] = -math.inf
    return row


def softmax(row):
    weights = [math.exp(x - max(row)) for x in row]
    return [w / sum(weights) for w in weights]


def naive_kept(row, params):
    """Tokens that survive the filters, one after the other; ties at a cut stay."""
    row = [x / params.temperature for x in row]
    kept = [t for t in range(len(row)) if row[t] > -math.inf]
    if 0 < params.top_k < len(row):
        kth = sorted(row, reverse=True)[params.top_k - 1]
        kept = [t for t in kept if row[t] >= kth]
    if params.top_p < 1:
        share = dict(zip(kept, softmax([row[t] for t in kept]), strict=True))
        before, last = 0.0, None
        for t in sorted(kept, key=lambda t: -row[t]):
            if before < params.top_p:
                last = row[t]
            before += share[t]
        kept = [t for t in kept if row[t] >= last]
    share = softmax(row)
    return [t for t in kept if share[t] >= params.min_p * max(share) * (1 - 1e-12)]


def naive_probabilities(row, params):
    if params.greedy:
        return [float(t == row.index(max(row))) for t in range(len(row))]
    kept = naive_kept(row, params)
    share = softmax([row[t] / params.temperature for t in kept])
    return [share[kept.index(t)] if t in kept else 0.0 for t in range(len(row))]


# --- filters -----------------------------------------------------------------------------------------

filter_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    # Away from sums of these logits' probabilities, so that rounding decides nothing.
    top_p=st.sampled_from([1.0, 0.123457, 0.501237, 0.873911]),
    top_k=st.sampled_from([-1, 0, 1, 2, 3, 11, 12, 50]),
    min_p=st.sampled_from([0.0, 0.0301237, 0.299971, 1.0]),
)
rows_with_ties = st.lists(st.sampled_from([-math.inf, -2.0, -1.0, 0.0, 1.0, 3.0]), min_size=12, max_size=12).filter(
    lambda row: max(row) > -math.inf
)
rows_without_ties = st.permutations([x * 0.37 - 2 for x in range(12)])


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(rows_with_ties | rows_without_ties, filter_params), min_size=1, max_size=5))
def test_filters_keep_what_the_naive_reference_keeps(rows):
    """A wrong order of filters, a k that reaches into another row, a lost tie, or k ≥ V would show here."""
    logits = torch.tensor([row for row, _ in rows])
    batch = batch_of(*[p for _, p in rows], vocab_size=12)
    found = probabilities(process_logits(logits, batch), batch)
    for i, (row, params) in enumerate(rows):
        expected = naive_probabilities(row, params)
        assert [x > 0 for x in found[i].tolist()] == [x > 0 for x in expected]
        assert found[i].tolist() == pytest.approx(expected, abs=1e-6)


def test_every_tie_at_the_kth_place_stays():
    """Dropping some of them would make the result depend on the sort of the device."""
    batch = batch_of(SamplingParams(top_k=2, top_p=0.9))
    kept = process_logits(torch.tensor([[1.0, 3.0] + [2.0] * 3 + [0.0] * 11]), batch) > -math.inf
    assert kept[0].nonzero().flatten().tolist() == [1, 2, 3, 4]


def test_no_filter_sorts_the_vocabulary(monkeypatch):
    """A full sort of 248,320 logits costs more than the rest of sampling."""

    def refuse(*_, **__):
        raise AssertionError("sorted the vocabulary")

    for owner, name in [(torch.Tensor, "sort"), (torch, "sort"), (torch.Tensor, "argsort"), (torch, "argsort")]:
        monkeypatch.setattr(owner, name, refuse)
    params = [SamplingParams(top_p=0.9, top_k=5), SamplingParams(min_p=0.1), SamplingParams(temperature=0)]
    process_logits(torch.randn(4, 16), batch_of(*params, SamplingParams(top_p=0.9)))


def test_a_tiny_temperature_does_not_overflow():
    batch = batch_of(SamplingParams(temperature=1e-5), vocab_size=3)
    logits = torch.tensor([[1e4, 1e4 - 1, -1e4]])
    assert probabilities(process_logits(logits, batch), batch).tolist() == [[1.0, 0.0, 0.0]]


def test_half_precision_logits_are_processed_in_float32():
    batch = batch_of(SamplingParams(temperature=0.7), vocab_size=3)
    assert process_logits(torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16), batch).dtype == torch.float32


# --- penalties, biases, min-tokens --------------------------------------------------------------------

penalty_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.0]),
    presence_penalty=st.sampled_from([0.0, 1.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.3, -0.7]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 7), st.sampled_from([-100.0, 2.5]), max_size=3),
    min_tokens=st.sampled_from([0, 2, 4]),
)
token_lists = st.lists(st.integers(0, 7), max_size=6)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(penalty_params, token_lists, token_lists), min_size=1, max_size=4), st.randoms())
def test_adjustments_equal_the_naive_reference(rows, rng):
    """A penalty on the wrong row, on prompt tokens, of the wrong sign or counted once too often would show here."""
    params, prompts, outputs = zip(*rows, strict=True)
    logits = torch.tensor([[rng.uniform(-3, 3) for _ in range(8)] for _ in rows])
    stop_ids = [{i % 8, 7} for i in range(len(rows))]
    batch = batch_of(*params, vocab_size=8, stop_ids=stop_ids)
    before = logits.clone()
    lengths = torch.tensor([len(output) for output in outputs])
    found = process_logits(logits, batch, TokenHistory(batch, prompts, outputs), lengths)
    assert torch.equal(logits, before)
    for i, p in enumerate(params):
        expected = torch.tensor(naive_adjusted(logits[i].tolist(), p, prompts[i], outputs[i], stop_ids[i]))
        torch.testing.assert_close(found[i] - found[i].max(), expected - expected.max())


def test_token_2_is_penalised_for_this_step_s_token_1():
    batch = batch_of(SamplingParams(presence_penalty=2.0), SamplingParams(), vocab_size=4)
    history = TokenHistory(batch, [[0], [0]], [[], []])
    history.add(torch.tensor([3, 3]))
    logits = torch.zeros(2, 4)
    assert process_logits(logits, batch, history).tolist() == [[0, 0, 0, -2], [0, 0, 0, 0]]


def test_history_counts_only_where_the_mask_says():
    """A rejected draft, or the filler in its place, must not be penalised. A sampled PAD id must be."""
    pad = 3
    batch = batch_of(*[SamplingParams(frequency_penalty=0.5)] * 2, vocab_size=4)
    history = TokenHistory(batch, [[], []], [[pad], []])
    history.add(torch.tensor([pad, pad]), torch.tensor([True, False]))
    assert history.counts_PV.tolist() == [[0, 0, 0, 2], [0, 0, 0, 0]]
    history.add(torch.tensor([pad, 0]), times=-1, mask_B=torch.tensor([True, False]))
    assert history.counts_PV.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]


def test_history_rebuilt_equals_history_kept():
    """The engine builds it anew whenever the batch changes."""
    rng = random.Random(0)
    params = [SamplingParams(repetition_penalty=1.1), SamplingParams(), SamplingParams(presence_penalty=1.0)]
    batch = batch_of(*params, vocab_size=9)
    prompts = [[rng.randrange(9) for _ in range(5)] for _ in params]
    outputs = [[] for _ in params]
    kept = TokenHistory(batch, prompts, outputs)
    for _ in range(7):
        tokens = [rng.randrange(9) for _ in params]
        mask = [rng.random() < 0.6 for _ in params]
        kept.add(torch.tensor(tokens), torch.tensor(mask))
        for output, token, counted in zip(outputs, tokens, mask, strict=True):
            output.extend([token] * counted)
    rebuilt = TokenHistory(batch, prompts, outputs)
    assert torch.equal(kept.counts_PV, rebuilt.counts_PV)
    assert torch.equal(kept.in_prompt_PV, rebuilt.in_prompt_PV)
    assert torch.equal(kept.penalty_PV, rebuilt.penalty_PV)
    assert kept.counts_PV.shape == (2, 9)


# --- what the host knows --------------------------------------------------------------------------------


def test_flags_name_the_work_that_is_needed():
    plain = batch_of(SamplingParams(temperature=0, top_k=5, top_p=0.5, min_p=0.2), SamplingParams(temperature=0))
    assert (plain.all_greedy, plain.any_greedy, plain.max_top_k, plain.max_kept) == (True, True, 0, 0)
    assert not plain.any_penalty
    assert plain.nucleus_rows is None
    assert plain.biases is None
    assert plain.min_stops is None
    assert plain.max_logprobs is None
    mixed = batch_of(
        SamplingParams(top_k=7, threshold=1.5),
        SamplingParams(top_k=99, logprobs=3, threshold=2),
        SamplingParams(top_p=0.5, presence_penalty=1, logprobs=0, threshold=1.01),
    )
    assert (mixed.all_greedy, mixed.any_greedy, mixed.max_top_k, mixed.max_logprobs) == (False, False, 7, 3)
    assert mixed.nucleus_rows.tolist() == [2]
    assert mixed.penalised == (2,)
    assert not mixed.any_drafts
    assert batch_of(SamplingParams(threshold=1.0)).any_drafts


def test_nothing_waits_for_the_device():
    """Tensors on the meta device have no values: any `.item()`, `.tolist()` or boolean index would raise."""
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=3, top_p=0.9, min_p=0.1, presence_penalty=1.0, min_tokens=2),
        SamplingParams(top_p=0.9, logit_bias={1: 2.0}, repetition_penalty=1.2),
    ]
    batch = batch_of(*params, stop_ids=[{1}, {1, 2}, {1}], device="meta")
    history = TokenHistory(batch, [[1], [2], [3]], [[], [4], []])
    position = torch.zeros(3, dtype=torch.int64, device="meta")
    logits = torch.zeros(3, 16, device="meta")
    processed = process_logits(logits, batch, history, position)
    tokens = sample(processed, batch, position, TOKEN1)
    history.add(tokens, tokens > 0)
    p = probabilities(processed, batch)
    u = uniform(batch.key_B, position, VERIFY)
    assert speculative_verify(p, p, tokens, u, u).replacement_B.shape == (3,)
    assert token_logprobs(logits, tokens, 2).top_BK.shape == (3, 2)
