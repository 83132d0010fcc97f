"""Sampling of both tokens of a pair on SGLang: what limits token 1 limits token 2, and token 2 knows token 1."""

from collections import Counter
from math import sqrt

import pytest
import torch

from checkpoints import EOS, MARGIN, prompt, save_pipo
from pipo import reference
from served import LLAMA
from servers import greedy, serving

PART = LLAMA.options["chunked_prefill_size"]
"""Pairs of a long prompt that are read at once."""
BROKEN = 257
"""A token whose embedding is not finite."""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampling") / "model"
    model = save_pipo(folder, "llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[BROKEN] = torch.nan
    model.save_pretrained(folder)
    with serving(folder, chunked_prefill_size=PART) as server:
        yield model, server


class Writer:
    """`pipo.reference` with a request's settings, each as SGLang has it for a regular model."""

    def __init__(self, presence=0.0, frequency=0.0, repetition=1.0, bias=None, stops=(), min_new_tokens=0):
        self.presence, self.frequency, self.repetition = presence, frequency, repetition
        self.bias, self.stops, self.min_new_tokens = bias or {}, list(stops), min_new_tokens
        self.margin = float("inf")
        self.logits = {}

    def __call__(self, logits_V, tokens, step, slot):
        counts = Counter(tokens)
        for token, count in counts.items():
            value = logits_V[token] - self.presence - self.frequency * count
            logits_V[token] = value * self.repetition if value < 0 else value / self.repetition
        for token, value in self.bias.items():
            logits_V[token] += value
        if len(tokens) < self.min_new_tokens:
            logits_V[self.stops] = -torch.inf
        best, second = logits_V.topk(2).values.tolist()
        self.margin = min(self.margin, best - second)
        self.logits[len(tokens)] = logits_V
        return int(logits_V.argmax())

    def write(self, model, ids, max_tokens, threshold):
        stops = {*self.stops, EOS} if self.stops else ()
        made = reference.generate(model, ids, max_tokens=max_tokens, threshold=threshold, stop_ids=stops, pick=self)
        assert min(self.margin, made.margin) > MARGIN, "a choice is too close; take another prompt"
        return made


PENALTIES = [
    ({"presence": 1.5}, {"presence_penalty": 1.5}),
    ({"frequency": 0.9}, {"frequency_penalty": 0.9}),
    ({"repetition": 1.4}, {"repetition_penalty": 1.4}),
    ({"presence": -0.7, "frequency": 0.4, "repetition": 0.8}, None),
    ({}, {}),
]


def named(settings):
    return {f"{name}_penalty": value for name, value in settings.items()}


def test_penalties_count_every_token_that_is_shown(served):
    """One batch of requests that end one after the other: a count that comes a step late, or a row that is mixed up, shows."""
    model, server = served
    cases = [(mine, theirs, tau) for mine, theirs in PENALTIES for tau in (0.0, 0.5, 1.5)]
    prompts = [prompt(5 + index, seed=index) for index in range(len(cases))]
    lengths = [10 + 2 * index for index in range(len(cases))]
    params = [
        greedy(length, tau, **(named(mine) if theirs is None else theirs))
        for (mine, theirs, tau), length in zip(cases, lengths, strict=True)
    ]
    replies = server.generate(prompts, params)
    for reply, ids, (mine, _, tau), length in zip(replies, prompts, cases, lengths, strict=True):
        assert reply.token_ids == Writer(**mine).write(model, ids, length, tau).token_ids, (mine, tau)


def test_draws_after_parts_of_a_prompt_count_for_nothing(served):
    model, server = served
    ids = prompt(2 * 3 * PART + 7, seed=31)
    short = prompt(3, seed=32)
    server.forget()
    replies = server.generate([short, ids, ids[:40]], [greedy(20, 0.5, presence_penalty=2.0)] * 3)
    for reply, one in zip(replies, [short, ids, ids[:40]], strict=True):
        assert reply.token_ids == Writer(presence=2.0).write(model, one, 20, 0.5).token_ids


def test_stops_wait_for_min_new_tokens(served):
    """Counted in tokens, token 1 before token 2: a minimum that falls between the two tokens of a pair holds for the first alone."""
    model, server = served
    ids = prompt(6, seed=41)
    for threshold in (0.0, 0.5):
        free = Writer().write(model, ids, 16, threshold).token_ids
        stops = free[:8]
        minimums = [3, 4, 5, 6]
        params = [
            {"temperature": 0, "max_new_tokens": 24, "min_new_tokens": least, "stop_token_ids": stops,
             "custom_params": {"threshold": threshold}}
            for least in minimums
        ]  # fmt: skip
        for reply, least in zip(server.generate([ids] * 4, params), minimums, strict=True):
            writer = Writer(stops=[*stops, EOS], min_new_tokens=least)
            assert reply.token_ids == writer.write(model, ids, 24, threshold).token_ids
            assert len(reply.token_ids) > least


def test_logit_bias_holds_for_both_tokens(served):
    model, server = served
    ids = prompt(9, seed=51)
    first, second = Writer().write(model, ids, 2, 0.0).token_ids
    bias = {first: -50.0, second: -50.0, 77: 3.0}
    (reply,) = server.generate([ids], greedy(16, 0.0, logit_bias={str(token): value for token, value in bias.items()}))
    assert reply.token_ids == Writer(bias=bias).write(model, ids, 16, 0.0).token_ids


def test_token_2_is_drawn_from_the_models_distribution_after_token_1(served):
    """Both draws are free of each other but for what the model says: frequencies of pairs are products of its probabilities."""
    model, server = served
    ids, num, top = prompt(8, seed=61), 600, 3
    expected = pair_probabilities(model, ids, top)
    params = {
        "temperature": 1.0,
        "top_k": top,
        "max_new_tokens": 2,
        "ignore_eos": True,
        "custom_params": {"threshold": 0},
    }
    mixed = [greedy(2, 0.0) if index % 4 == 0 else params for index in range(4 * num // 3)]
    replies = server.generate([ids] * len(mixed), mixed)
    best = Writer().write(model, ids, 2, 0.0).token_ids
    assert all(reply.token_ids == best for reply, one in zip(replies, mixed, strict=True) if one is not params)
    drawn = [tuple(reply.token_ids) for reply, one in zip(replies, mixed, strict=True) if one is params]
    found = Counter(drawn)
    assert set(found) <= set(expected)
    for pair, probability in expected.items():
        spread = sqrt(probability * (1 - probability) / len(drawn))
        assert abs(found[pair] / len(drawn) - probability) < 4.5 * spread + 1e-3, (pair, probability)


@torch.no_grad()
def pair_probabilities(model, ids, top):
    """Of every pair of tokens, where each is drawn among the `top` most likely."""
    found = {}

    class Fixed:
        def __init__(self, first):
            self.first, self.logits = first, []

        def __call__(self, logits_V, tokens, step, slot):
            self.logits.append(logits_V)
            return int(logits_V.argmax()) if self.first is None or slot else self.first

    def best(logits_V):
        values, tokens = logits_V.topk(top)
        return zip(tokens.tolist(), values.softmax(-1).tolist(), strict=True)

    look = Fixed(None)
    reference.generate(model, ids, max_tokens=2, threshold=0, pick=look)
    for first, p1 in best(look.logits[0]):
        after = Fixed(first)
        reference.generate(model, ids, max_tokens=2, threshold=0, pick=after)
        found |= {(first, second): p1 * p2 for second, p2 in best(after.logits[1])}
    return found


def test_states_that_are_not_finite_end_their_request_alone(served):
    """In one batch, greedy and sampled: the neighbours neither fall with it nor change, and the server goes on."""
    model, server = served
    prompts = [prompt(6, seed=90), [*prompt(4, seed=91), BROKEN, 5], prompt(7, seed=92)]
    others = [Writer().write(model, ids, 10, 0.5).token_ids for ids in (prompts[0], prompts[2])]
    for temperature in (0, 1.0):
        params = [greedy(10, 0.5), greedy(10, 0.5, temperature=temperature), greedy(10, 0.5)]
        first, broken, last = server.generate(prompts, params)
        assert [first.token_ids, last.token_ids] == others
        assert broken.meta["finish_reason"] == {"type": "stop", "matched": "NaN happened"}
        assert len(broken.token_ids) == 1


# --- log-probabilities ---------------------------------------------------------------------------------------------------


def test_log_probabilities_of_every_visible_token(served):
    """One entry per token, in step with the ids, also where a stop or the limit cuts a pair."""
    model, server = served
    ids = prompt(7, seed=71)
    free = Writer().write(model, ids, 12, 0.5)
    cut = next(pair.token1 for pair in free.pairs[1:] if pair.token1 not in free.token_ids[:2])
    for length, stops, threshold in ((12, [], 0.5), (7, [], 0.0), (12, [cut], 0.5), (9, [], 1.5)):
        writer = Writer()
        made = reference.generate(model, ids, max_tokens=length, threshold=threshold, stop_ids=stops, pick=writer)
        params = greedy(length, threshold, stop_token_ids=stops, ignore_eos=False)
        asked = {"return_logprob": True, "top_logprobs_num": 3, "token_ids_logprob": [5, 6]}
        (reply,) = server.generate([ids], params, **asked)
        check_logprobs(reply, made.token_ids, writer)


def check_logprobs(reply, token_ids, writer):
    assert reply.token_ids == token_ids
    meta, size = reply.meta, len(token_ids)
    entries = meta["output_token_logprobs"], meta["output_top_logprobs"], meta["output_token_ids_logprobs"]
    assert [len(one) for one in entries] == [size] * 3
    for index, (chosen, top, asked) in enumerate(zip(*entries, strict=True)):
        log_p = writer.logits[index].log_softmax(-1)
        assert chosen[1] == token_ids[index]
        assert chosen[0] == pytest.approx(float(log_p[chosen[1]]), abs=1e-4)
        assert [one[1] for one in top] == log_p.topk(3).indices.tolist()
        assert [one[0] for one in top] == pytest.approx(log_p.topk(3).values.tolist(), abs=1e-4)
        assert [one[1] for one in asked] == [5, 6]
        assert [one[0] for one in asked] == pytest.approx(log_p[[5, 6]].tolist(), abs=1e-4)


def test_log_probabilities_beside_requests_that_want_none(served):
    """Rows of one batch: only some want log-probabilities, with different numbers of alternatives."""
    model, server = served
    prompts = [prompt(4 + index, seed=80 + index) for index in range(4)]
    taus = [0.5, 0.5, 0.0, 1.5]
    asked = {"return_logprob": [True, False, True, True], "top_logprobs_num": [2, 0, 0, 1]}
    replies = server.generate(prompts, [greedy(11, tau, presence_penalty=0.5) for tau in taus], **asked)
    for reply, ids, tau, wanted, num in zip(replies, prompts, taus, *asked.values(), strict=True):
        writer = Writer(presence=0.5)
        tokens = writer.write(model, ids, 11, tau).token_ids
        assert reply.token_ids == tokens
        if not wanted:
            assert "output_token_logprobs" not in reply.meta
            continue
        # As for a regular model: of the distribution that was drawn from, penalties and all.
        log_p = [writer.logits[index].log_softmax(-1) for index in range(len(tokens))]
        expected = [float(one[token]) for one, token in zip(log_p, tokens, strict=True)]
        assert [entry[0] for entry in reply.meta["output_token_logprobs"]] == pytest.approx(expected, abs=1e-4)
        if num:
            assert [len(top) for top in reply.meta["output_top_logprobs"]] == [num] * len(tokens)


def test_log_probabilities_are_streamed_in_step_with_the_tokens(served):
    """Through the `openai` client: each chunk brings entries of its own tokens, as many as it shows."""
    from openai import OpenAI

    model, server = served
    ids = prompt(9, seed=95)
    writer = Writer()
    tokens = writer.write(model, ids, 13, 0.0).token_ids
    chunks = OpenAI(base_url=f"{server.url}/v1", api_key="none").completions.create(
        model="default", prompt=ids, max_tokens=13, temperature=0, logprobs=2, stream=True,
        extra_body={"custom_params": {"threshold": 0}, "ignore_eos": True}, stream_options={"include_usage": True},
    )  # fmt: skip
    found, sizes = [], []
    for chunk in chunks:
        for choice in chunk.choices:
            new = choice.logprobs.token_logprobs if choice.logprobs else []
            found += new
            sizes.append(len(new))
        usage = chunk.usage or None
    expected = [float(writer.logits[index].log_softmax(-1)[token]) for index, token in enumerate(tokens)]
    assert found == pytest.approx(expected, abs=1e-4)
    assert usage.completion_tokens == 13
    assert max(sizes) >= 2  # pairs arrive as pairs
