"""Sampling against naive per-row references: each test says what breaks if it fails."""

import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipo.engine.request import SamplingParams
from pipo.model import sampling
from pipo.model.sampling import (
    RESIDUAL,
    TOKEN1,
    TOKEN2,
    VERIFY,
    SamplingBatch,
    TokenHistory,
    derive_seed,
    probabilities,
    process_logits,
    sample,
    speculative_verify,
    token_logprobs,
    uniform,
)

torch.set_num_threads(1)


def batch_of(*params, vocab_size=16, seeds=None, stop_ids=None, device="cpu"):
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


def test_top_p_with_top_k_sorts_nothing(monkeypatch):
    """A full sort of 248,320 logits costs more than the rest of sampling."""

    def refuse(*_, **__):
        raise AssertionError("sorted the vocabulary")

    for owner, name in [(torch.Tensor, "sort"), (torch, "sort"), (torch.Tensor, "argsort"), (torch, "argsort")]:
        monkeypatch.setattr(owner, name, refuse)
    batch = batch_of(SamplingParams(top_p=0.9, top_k=5), SamplingParams(min_p=0.1), SamplingParams(temperature=0))
    assert not batch.needs_sort
    process_logits(torch.randn(3, 16), batch)
    with pytest.raises(AssertionError, match="sorted"):
        process_logits(torch.randn(1, 16), batch_of(SamplingParams(top_p=0.9)))


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
    assert kept.counts_PV.shape == (2, 9)


# --- what the host knows --------------------------------------------------------------------------------


def test_flags_name_the_work_that_is_needed():
    plain = batch_of(SamplingParams(temperature=0, top_k=5, top_p=0.5, min_p=0.2), SamplingParams(temperature=0))
    assert (plain.all_greedy, plain.any_greedy, plain.max_top_k, plain.needs_sort) == (True, True, 0, False)
    assert not plain.any_penalty
    assert plain.biases is None
    assert plain.min_stops is None
    assert plain.max_logprobs is None
    mixed = batch_of(
        SamplingParams(top_k=7, threshold=1.5),
        SamplingParams(top_k=99, logprobs=3, threshold=2),
        SamplingParams(top_p=0.5, presence_penalty=1, logprobs=0, threshold=1.01),
    )
    assert (mixed.all_greedy, mixed.any_greedy, mixed.max_top_k, mixed.max_logprobs) == (False, False, 7, 3)
    assert mixed.sorted_rows.tolist() == [2]
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
    u = uniform(batch.seed_B, position, VERIFY)
    assert speculative_verify(p, p, tokens, u, u).replacement_B.shape == (3,)
    assert token_logprobs(logits, tokens, 2).top_BK.shape == (3, 2)


# --- randomness -----------------------------------------------------------------------------------------


def test_the_hash_is_splitmix64():
    """Known first outputs for seeds 0 and 1234567: products must wrap and shifts must not copy the sign."""
    outputs = sampling._splitmix64_tensor(torch.tensor([0, 1234567, -5]))
    assert [x % 2**64 for x in outputs.tolist()][:2] == [0xE220A8397B1DCDAF, 6457827717110365317]
    assert outputs[2].item() == sampling._splitmix64(-5)


def test_uniforms_are_uniform_and_unrelated():
    seeds = torch.arange(20_000)
    first, second = uniform(seeds, 0, TOKEN1), uniform(seeds, 0, TOKEN2)
    later = uniform(seeds, torch.ones_like(seeds), TOKEN1)
    along = uniform(torch.full((20_000,), 7), torch.arange(20_000), TOKEN1)
    for values in (first, second, later, along):
        assert values.min() >= 0
        assert values.max() < 1
        counts = torch.histc(values.float(), 20, 0, 1)
        assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001
    for other in (second, later, along):
        assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 0.03


def test_samples_of_one_request_have_seeds_of_their_own():
    assert derive_seed(5, 0) == 5
    assert len({derive_seed(seed, index) for seed in range(50) for index in range(1, 50)}) == 50 * 49


def test_seeds_of_any_size_are_taken():
    batch = batch_of(*[SamplingParams()] * 3, seeds=[2**63, -(2**63), 2**64 + 1])
    assert batch.seed_B.tolist() == [-(2**63), -(2**63), 1]


# --- the draw -------------------------------------------------------------------------------------------


def test_samples_follow_the_distribution():
    """Chi-square against the exact probabilities: a biased uniform or an off-by-one in the search would show."""
    params = SamplingParams(temperature=1.3, top_k=6, min_p=0.01)
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(0))
    batch = batch_of(*[params] * 40_000, vocab_size=10)
    tokens = sample(process_logits(logits.expand(40_000, 10), batch), batch, 0, TOKEN1)
    expected = 40_000 * torch.tensor(naive_probabilities(logits[0].tolist(), params))
    counts = torch.bincount(tokens, minlength=10)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < 20.5  # 5 degrees of freedom, p = 0.001


@pytest.mark.parametrize("u", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
def test_a_token_without_probability_is_never_drawn(u):
    """Not at either end of the vocabulary, nor at either end of the unit interval."""
    p = torch.zeros(1, 1000)
    p[0, [10, 500, 990]] = torch.tensor([1e-6, 1 - 2e-6, 1e-6])
    drawn = sampling._draw(p, torch.tensor([u], dtype=torch.float64)).item()
    assert p[0, drawn] > 0


def test_the_draw_inverts_the_cumulated_distribution():
    p = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).expand(5, 4)
    u = torch.tensor([0.0, 0.2499999, 0.25, 0.7499999, 0.75], dtype=torch.float64)
    assert sampling._draw(p, u).tolist() == [0, 0, 2, 2, 3]


def test_a_row_gets_the_same_tokens_alone_and_in_any_batch():
    """What makes a seed mean something under continuous batching."""
    rng = random.Random(1)
    params = [
        SamplingParams(),
        SamplingParams(top_k=5, top_p=0.8),
        SamplingParams(top_p=0.7),
        SamplingParams(temperature=0),
        SamplingParams(min_p=0.05, temperature=1.7),
        SamplingParams(top_k=40),
    ]
    seeds = [rng.getrandbits(63) for _ in params]
    logits = torch.randn(6, 100, generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([3, 1, 4, 1, 5, 9])

    def draw(rows, slot):
        batch = batch_of(*[params[i] for i in rows], vocab_size=100, seeds=[seeds[i] for i in rows])
        return sample(process_logits(logits[rows], batch), batch, positions[rows], slot).tolist()

    for slot in (TOKEN1, TOKEN2):
        alone = [draw([i], slot)[0] for i in range(6)]
        for _ in range(10):
            rows = rng.sample(range(6), rng.randint(1, 6))
            assert draw(rows, slot) == [alone[i] for i in rows]


def test_greedy_rows_take_the_best_token_among_sampling_ones():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    batch = batch_of(*[SamplingParams(temperature=0, top_p=0.1)] * 2, SamplingParams(), vocab_size=50)
    tokens = sample(process_logits(logits, batch), batch, 0, TOKEN1)
    assert tokens[:2].tolist() == logits[:2].argmax(-1).tolist()
    assert tokens.dtype == torch.int64


def test_probabilities_are_those_of_the_draw():
    """Verification is lossless only for the distribution that drafts are really drawn from."""
    params = SamplingParams(top_k=4, temperature=0.8)
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(3))
    batch = batch_of(params, vocab_size=8)
    processed = process_logits(logits, batch)
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    drawn = sampling._draw(processed.softmax(-1).expand(200_000, 8), grid)
    frequencies = torch.bincount(drawn, minlength=8) / 200_000
    torch.testing.assert_close(frequencies, probabilities(processed, batch)[0], atol=1e-5, rtol=0)


# --- speculative verification -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_verification_is_lossless(seed):
    """Over a grid of both uniforms and every draft, weighted by q, the outcome is distributed as p."""
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.softmax(torch.randn(2, 5, generator=generator) * 1.5, -1)
    p[1], q[2] = 0.0, 0.0
    p, q = p / p.sum(), q / q.sum()
    n = 300
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    accept, residual = (u.flatten() for u in torch.meshgrid(grid, grid, indexing="ij"))
    outcome = torch.zeros(5, dtype=torch.float64)
    for draft in range(5):
        drafts = torch.full((n * n,), draft)
        verdict = speculative_verify(p.expand(n * n, 5), q.expand(n * n, 5), drafts, accept, residual)
        tokens = torch.where(verdict.accepted_B, drafts, verdict.replacement_B)
        outcome += q[draft].double() * torch.bincount(tokens, minlength=5) / n**2
    torch.testing.assert_close(outcome, p.double(), atol=0.005, rtol=0)
    assert outcome[1] == 0


def test_equal_distributions_accept_every_draft():
    p = torch.softmax(torch.randn(1000, 6, generator=torch.Generator().manual_seed(0)), -1)
    seeds = torch.arange(1000)
    drafts = sampling._draw(p, uniform(seeds, 0, TOKEN2))
    verdict = speculative_verify(p, p, drafts, uniform(seeds, 0, VERIFY), uniform(seeds, 0, RESIDUAL))
    assert verdict.accepted_B.all()


def test_greedy_verification_keeps_only_the_target_s_best_token():
    p, q = torch.eye(4)[[0, 1]], torch.eye(4)[[0, 2]]
    u = torch.full((2,), 0.5, dtype=torch.float64)
    verdict = speculative_verify(p, q, torch.tensor([0, 2]), u, u)
    assert verdict.accepted_B.tolist() == [True, False]
    assert verdict.replacement_B[1] == 1


# --- log-probabilities --------------------------------------------------------------------------------------


def test_log_probabilities_are_the_model_s_own():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(4)) * 10
    tokens = torch.tensor([0, 7, 19])
    found = token_logprobs(logits, tokens, 4)
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(found.chosen_B, expected[torch.arange(3), tokens])
    torch.testing.assert_close(found.top_BK, expected.sort(descending=True).values[:, :4])
    torch.testing.assert_close(expected.gather(1, found.top_ids_BK), found.top_BK)
    assert token_logprobs(logits, tokens).top_BK.shape == (3, 0)
    assert token_logprobs(logits, tokens, 99).top_BK.shape == (3, 20)


def test_log_probabilities_of_half_precision_logits_are_float32():
    """bf16 ones are quantised by 0.125 at magnitude 16 to 32."""
    logits = torch.tensor([[17.0, 16.875, 3.0]], dtype=torch.bfloat16)
    found = token_logprobs(logits, torch.tensor([1]))
    torch.testing.assert_close(found.chosen_B, logits.float().log_softmax(-1)[:, 1])
