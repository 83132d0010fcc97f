"""Counts of a batch whose requests come, go and are sent back: they are those of each request's own tokens."""

import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from pipo.integrations.sglang.penalties import PenaltySettings
from pipo.integrations.sglang.rows import PairRows

VOCAB = 12
KINDS = [
    {},
    {"frequency_penalty": 0.5},
    {"presence_penalty": 1.5, "repetition_penalty": 0.7},
    {"repetition_penalty": 1.3},
    {"min_new_tokens": 5, "stop_token_ids": {3}},
    {"min_new_tokens": 3, "stop_token_ids": {1, 4}, "frequency_penalty": -0.4},
]


def request(kind, tokens=(), threshold=0.5):
    params = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0}
    params |= {"stop_token_ids": None} | KINDS[kind]
    pairs = SimpleNamespace(tokens=list(tokens), threshold=threshold)
    return SimpleNamespace(sampling_params=SimpleNamespace(**params), eos_token_ids={7}, tokenizer=None, pairs=pairs)


def expected(req, logits_V):
    """One request's logits, from its tokens alone."""
    params, logits_V = req.sampling_params, logits_V.clone()
    for token, count in Counter(req.pairs.tokens).items():
        value = logits_V[token] - params.frequency_penalty * count - params.presence_penalty
        scale = params.repetition_penalty
        logits_V[token] = value * scale if value < 0 else value / scale
    if len(req.pairs.tokens) < params.min_new_tokens:
        logits_V[sorted(params.stop_token_ids | req.eos_token_ids)] = -torch.inf
    return logits_V


def rows_of(reqs):
    return PairRows.of(reqs, VOCAB, "cpu")


@pytest.mark.parametrize("seed", range(30))
def test_counts_follow_their_requests(seed):
    """Steps with a copy, as in overlap scheduling; between them requests leave, others join, and some start again from their tokens."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    reqs = [request(draw.randrange(len(KINDS))) for _ in range(draw.randint(1, 4))]
    rows = rows_of(reqs)
    for _ in range(12):
        step = rows.for_forward()
        for slot in range(2):
            logits_RV = torch.randn(len(reqs), VOCAB)
            found_RV = logits_RV.clone()
            step.penalties.apply_(found_RV)
            for req, one_V, found_V in zip(reqs, logits_RV, found_RV, strict=True):
                torch.testing.assert_close(found_V, expected(req, one_V))
            token_R = torch.tensor([draw.randrange(VOCAB) for _ in reqs])
            shown_R = torch.tensor([slot == 0 or draw.random() < 0.5 for _ in reqs])
            step.penalties.count(token_R, None if slot == 0 else shown_R)
            for req, token, shown in zip(reqs, token_R.tolist(), shown_R.tolist(), strict=True):
                req.pairs.tokens += [token] * shown
        if draw.random() < 0.4:
            keep = sorted(draw.sample(range(len(reqs)), draw.randint(1, len(reqs))))
            rows.filter(keep, torch.tensor(keep))
            reqs = [reqs[row] for row in keep]
        if draw.random() < 0.4:
            new = [
                request(draw.randrange(len(KINDS)), [draw.randrange(VOCAB) for _ in range(draw.choice([0, 0, 6]))], tau)
                for tau in (0.0, 1.5)
            ]
            rows.merge(rows_of(new))
            reqs = reqs + new
        assert rows.threshold_R.tolist() == [req.pairs.threshold for req in reqs]
        assert rows.any_drafts == any(req.pairs.threshold <= 1 for req in reqs)


def test_what_nobody_asks_for_takes_no_memory():
    """A count for each entry of a vocabulary is a megabyte a request."""
    plain, counted = rows_of([request(0), request(0)]), rows_of([request(1)])
    assert plain.penalties.counts_RV is None
    plain.merge(counted)
    assert plain.penalties.counts_RV.shape == (3, VOCAB)
    plain.filter([0, 1], torch.tensor([0, 1]))
    assert plain.penalties.counts_RV is None
    assert plain.penalties.num_tokens_R is None


def test_min_new_tokens_holds_back_every_kind_of_stop():
    req = request(4)
    req.tokenizer = SimpleNamespace(eos_token_id=9, additional_stop_token_ids={10})
    assert PenaltySettings.of(req).stop_ids == (3, 7, 9, 10)
    req.tokenizer = SimpleNamespace(eos_token_id=None, additional_stop_token_ids=None)
    assert PenaltySettings.of(req).stop_ids == (3, 7)
