"""Requests on SGLang: where they end, what of them is shown and counted, and that nothing is left behind. All in tokens, not pairs."""

import json
import time
from itertools import pairwise

import pytest
import requests
import torch

from byte_tokenizer import byte_tokenizer
from checkpoints import EOS, MARGIN, expected, prompt, save_pipo
from pipo import reference
from servers import greedy, serving

MAX_PAIRS = 192
"""Positions of the model: pairs of prompt and reply together."""
RESERVED = 6
"""Positions that SGLang leaves free, whatever the model."""
TAU = 0.5
TOKENIZER = byte_tokenizer()
LETTERS = TOKENIZER.encode("abcdefghijklmnopqrstuvwxyz")
LETTERS_ONLY = {str(letter): 100 for letter in LETTERS}
COUNTERS = [
    "sglang:generation_tokens_total",
    "sglang:prompt_tokens_total",
    'sglang:realtime_tokens_total{engine_type="unified",mode="prefill_compute"',
]
"""Of the replies, of the prompts, and of what of the prompts was not cached."""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("requests") / "model"
    model = save_pipo(folder, "llama", max_position_embeddings=MAX_PAIRS)
    with serving(folder, enable_metrics=True, reasoning_parser="qwen3") as server:
        yield model, server


def spell(model, ids, max_tokens=24, threshold=TAU, stop_ids=()):
    """What the model writes in letters, and how: one byte a letter, so stops can be placed anywhere in pairs."""
    margins = []

    def pick(logits_V, tokens, step, slot):
        best, second = logits_V[LETTERS].topk(2).values.tolist()
        margins.append(best - second)
        return LETTERS[int(logits_V[LETTERS].argmax())]

    made = reference.generate(model, ids, max_tokens=max_tokens, threshold=threshold, stop_ids=stop_ids, pick=pick)
    assert min(margins) > MARGIN, "a choice is too close; take another prompt"
    return made


def letters(max_tokens=24, threshold=TAU, **others):
    return greedy(max_tokens, threshold, logit_bias=LETTERS_ONLY, **others)


def starts(made):
    """Where each pair starts in the text, and whether it holds two tokens."""
    at = 0
    for pair in made.pairs:
        yield at, pair.committed
        at += 1 + pair.committed


def counts(made):
    judged = [pair for pair in made.pairs if pair.draft is not None]
    return len(made.pairs), made.num_committed, len(judged)


def text_of(ids):
    return TOKENIZER.decode(ids)


# --- ends


def test_a_stop_id_cuts_the_pair_it_is_in(served):
    """As token 1 it takes the draft with it; such a draft counts neither as kept nor as rejected."""
    model, server = served
    for seed in range(3):
        ids = prompt(9 + seed, seed)
        free = spell(model, ids).token_ids
        for stop in sorted(set(free)):
            made = spell(model, ids, stop_ids={stop})
            (reply,) = server.generate([ids], letters(ignore_eos=False, stop_token_ids=[stop]))
            assert reply.token_ids == made.token_ids == free[: free.index(stop) + 1]
            assert reply.text == text_of(reply.token_ids[:-1])
            assert reply.meta["finish_reason"] == {"type": "stop", "matched": stop}
            assert reply.meta["completion_tokens"] == len(reply.token_ids)
            assert (reply.meta["num_pairs"], reply.meta["num_committed"]) == counts(made)[:2]


def test_a_stop_string_or_regex_ends_text_ids_and_logprobs_alike(served):
    """Inside pairs and across them; ids hold the token that completed the stop, and no token more."""
    model, server = served
    ids = prompt(14, seed=4)
    made = spell(model, ids, max_tokens=40)
    text = text_of(made.token_ids)
    pairs = dict(starts(made))
    ends = {"first": set(), "second": set()}
    for length in (1, 2, 3):
        for at in range(2, 36):
            stop = text[at : at + length]
            if text.index(stop) != at:
                continue
            end = at + length
            ends["first" if end - 1 in pairs else "second"].add(end)
            for params in ({"stop": [stop]}, {"stop_regex": [f"(?:{stop})"]}):
                (reply,) = server.generate(
                    [ids], letters(40, ignore_eos=False, **params), return_logprob=True, logprob_start_len=-1
                )
                assert reply.token_ids == made.token_ids[:end]
                assert reply.text == (text[:at] if "stop" in params else text[:end])
                shown = [token for _, token, _ in reply.meta["output_token_logprobs"]]
                assert shown == reply.token_ids
                assert reply.meta["completion_tokens"] == end
    assert all(ends.values()), "the prompt must show stops in both slots"


def test_an_eos_as_the_very_first_token_ends_the_request(served):
    _, server = served
    bias = {str(EOS): 1000}
    both = [
        {**greedy(8, TAU), "logit_bias": bias, "ignore_eos": False},
        {**greedy(8, TAU), "logit_bias": bias, "ignore_eos": True},
    ]
    ended, went_on = server.generate([prompt(7), prompt(7)], both)
    assert ended.token_ids == [EOS]
    assert ended.text == ""
    assert ended.meta["completion_tokens"] == 1
    assert ended.meta["num_committed"] == 0
    assert went_on.token_ids == [EOS] * 8


@pytest.mark.parametrize("threshold", [0.0, TAU, 1.5])
def test_max_tokens_are_tokens(served, threshold):
    """An even number ends a pair or cuts it, as it comes; none at all still fills the cache that others share."""
    model, server = served
    ids = prompt(11, seed=2)
    lengths = [0, 1, 2, 3, 7, 8]
    whole = expected(model, ids, 8, threshold)
    for length, reply in zip(
        lengths, server.generate([ids] * len(lengths), [greedy(length, threshold) for length in lengths]), strict=True
    ):
        assert reply.token_ids == whole[:length]
        assert reply.meta["finish_reason"] == {"type": "length", "length": length}
        assert reply.meta["completion_tokens"] == length
        if length:
            made = reference.generate(model, ids, max_tokens=length, threshold=threshold)
            num_pairs, committed, _ = counts(made)
            assert (reply.meta["num_pairs"], reply.meta["num_committed"]) == (num_pairs, committed)
        if threshold > 1:
            assert reply.meta["num_rejected"] == 0, "nothing was drafted"


def test_drafts_kept_and_rejected_are_reported(served):
    model, server = served
    ids = prompt(10, seed=5)
    (reply,) = server.greedy([ids], 21, TAU)
    made = reference.generate(model, ids, max_tokens=21, threshold=TAU)
    rejected = sum(not pair.committed for pair in made.pairs[:-1])  # the last pair's draft was kept, or cut off
    assert reply.meta["num_committed"] == made.num_committed
    assert reply.meta["num_rejected"] == rejected
    assert reply.meta["spec_num_proposed_drafts"] == made.num_committed + rejected
    body = {
        "model": "m", "prompt": ids, "max_tokens": 21, "temperature": 0, "ignore_eos": True,
        "custom_params": {"threshold": TAU}, "return_spec_tokens_details": True,
    }  # fmt: skip
    out = requests.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    assert out["sglext"]["spec_tokens_details"]["spec_num_correct_drafts"] == made.num_committed
    assert out["usage"]["completion_tokens"] == 21
    assert out["usage"]["prompt_tokens"] == 10


# --- lengths


def test_a_prompt_may_have_more_tokens_than_the_model_has_positions(served):
    model, server = served
    ids = prompt(MAX_PAIRS + 21, seed=3)
    (reply,) = server.greedy([ids], 10, TAU)
    assert reply.token_ids == expected(model, ids, 10, TAU)
    assert reply.meta["prompt_tokens"] == len(ids)
    (model_card,) = requests.get(f"{server.url}/v1/models", timeout=10).json()["data"]
    assert model_card["max_model_len"] == 2 * MAX_PAIRS


@pytest.mark.parametrize("threshold", [0.0, TAU, 1.5])
def test_where_pairs_run_out_the_reason_is_length(served, threshold):
    """And nothing is written that the model has no position for."""
    model, server = served
    ids = prompt(2 * (MAX_PAIRS - 20) - 1, seed=6)
    (reply,) = server.greedy([ids], 41, threshold)
    assert reply.meta["finish_reason"]["type"] == "length"
    num_pairs = reply.meta["num_pairs"]
    assert 20 - RESERVED <= num_pairs <= 20
    whole = reference.generate(model, ids, max_tokens=41, threshold=threshold)
    written = sum(1 + pair.committed for pair in whole.pairs[:num_pairs])
    assert reply.token_ids == expected(model, ids, written, threshold)


def test_a_prompt_that_does_not_fit_is_refused_by_its_pairs(served):
    _, server = served
    for num_tokens in (2 * MAX_PAIRS - 3, 2 * MAX_PAIRS + 50):
        body = {"input_ids": prompt(num_tokens), "sampling_params": greedy(4)}
        response = requests.post(f"{server.url}/generate", json=body, timeout=60)
        assert response.status_code == 400
        assert str(num_tokens) in response.text
    assert server.greedy([prompt(4)], 2)[0].token_ids


# --- streams


def stream(server, ids, params, path="/generate", **others):
    body = {"input_ids": ids, "sampling_params": params, "stream": True, **others}
    with requests.post(f"{server.url}{path}", json=body, stream=True, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                yield json.loads(line[6:])


@pytest.mark.parametrize("interval", [1, 3, 50])
def test_a_stream_says_the_same_in_parts(served, interval):
    """Ids, text and log-probabilities of each chunk go on where the last one ended; a stop's beginning is held back."""
    model, server = served
    ids = prompt(13, seed=8)
    made = spell(model, ids, max_tokens=30)
    text = text_of(made.token_ids)
    stop = text[17:20]
    end = text.index(stop) + len(stop)
    params = letters(30, stop=[stop], stream_interval=interval)
    chunks = list(stream(server, ids, params, return_logprob=True, logprob_start_len=-1))
    for before, after in pairwise(chunks):
        assert after["text"].startswith(before["text"])
        assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
    for chunk in chunks:
        shown = [token for _, token, _ in chunk["meta_info"]["output_token_logprobs"]]
        assert shown == chunk["output_ids"] == made.token_ids[: len(shown)]
        assert chunk["meta_info"]["completion_tokens"] == len(shown)
        assert text[: end - len(stop)].startswith(chunk["text"])
    assert chunks[-1]["output_ids"] == made.token_ids[:end]
    assert chunks[-1]["text"] == text[: end - len(stop)]
    sent = [len(after["output_ids"]) - len(before["output_ids"]) for before, after in pairwise(chunks[:-1])]
    assert all(num_tokens >= interval for num_tokens in sent)


def test_a_letter_of_several_tokens_is_never_cut(served):
    """The detokeniser holds back what is no whole character yet, wherever pairs end."""
    _, server = served
    ids = prompt(6, seed=1)
    bias = {str(byte): 100 for byte in TOKENIZER.encode("aä€")}
    chunks = list(stream(server, ids, {**greedy(40, TAU), "logit_bias": bias}))
    whole = TOKENIZER.decode(chunks[-1]["output_ids"])
    assert chunks[-1]["text"] == whole
    for chunk in chunks[:-1]:
        assert whole.startswith(chunk["text"])


# --- many at once


def test_samples_of_one_prompt_share_a_whole_cache(served):
    """SGLang reads the prompt once beforehand, asking for no tokens: the MTP block's cache must be filled all the same."""
    model, server = served
    ids = prompt(61, seed=9)
    params = {**greedy(12, TAU), "n": 3}
    body = {"input_ids": ids, "sampling_params": params}
    replies = requests.post(f"{server.url}/generate", json=body, timeout=60).json()
    for reply in replies:
        assert reply["output_ids"] == expected(model, ids, 12, TAU)
        assert reply["meta_info"]["cached_tokens"] == 60


def test_what_is_cancelled_leaves_nothing_behind(served):
    """The server is idle afterwards, which flushing asks for, with all of its memory, which it checks itself when idle."""
    model, server = served
    for seed in range(6):
        chunks = stream(server, prompt(20 + seed, seed), greedy(150, TAU))
        next(chunks)
        chunks.close()
    until = time.monotonic() + 60
    while requests.get(f"{server.url}/v1/loads", timeout=10).json()["loads"][0]["num_running_reqs"]:
        assert time.monotonic() < until, "a cancelled request goes on"
        time.sleep(0.1)
    server.forget()
    ids = prompt(20, seed=0)
    (reply,) = server.greedy([ids], 12, TAU)
    assert reply.num_cached == 0
    assert reply.token_ids == expected(model, ids, 12, TAU)


def test_an_aborted_request_shows_what_it_had_written(served):
    model, server = served
    ids = prompt(15, seed=2)
    chunks = stream(server, ids, greedy(160, TAU), rid="to-be-aborted")
    seen = [next(chunks) for _ in range(4)]
    assert requests.post(f"{server.url}/abort_request", json={"rid": "to-be-aborted"}, timeout=10).ok
    seen += chunks
    last = seen[-1]["meta_info"]
    assert last["finish_reason"]["type"] == "abort"
    assert 4 <= last["completion_tokens"] < 160
    shown = seen[-1]["output_ids"]
    assert len(shown) == last["completion_tokens"]
    assert shown == reference.generate(model, ids, max_tokens=len(shown), threshold=TAU).token_ids


# --- counters


def test_thoughts_are_counted_in_tokens(served):
    """Both slots count, and a draft that a stop cut off does not."""
    model, server = served
    for seed in range(20):
        ids = prompt(12, seed)
        free = spell(model, ids, max_tokens=20)
        stops = [at for at, two in starts(free) if two and free.token_ids.index(free.token_ids[at]) == at > 3]
        if stops:
            break
    stop = free.token_ids[stops[0]]
    (reply,) = server.generate([ids], letters(20, ignore_eos=False, stop_token_ids=[stop]), require_reasoning=True)
    assert len(reply.token_ids) == stops[0] + 1
    assert reply.meta["reasoning_tokens"] == stops[0] + 1


def scraped(server):
    lines = requests.get(f"{server.url}/metrics", timeout=10).text.splitlines()
    return [sum(float(line.split()[-1]) for line in lines if line.startswith(name)) for name in COUNTERS]


def test_metrics_count_tokens(served):
    _, server = served
    server.forget()
    before = scraped(server)
    server.greedy([prompt(40, seed=11)], 31, 0.0)
    time.sleep(1)
    assert [after - number for after, number in zip(scraped(server), before, strict=True)] == [31, 40, 40]


def test_nothing_above_stopped_the_server(served):
    model, server = served
    assert torch.is_tensor(model.lm_head.weight)
    assert requests.get(f"{server.url}/health_generate", timeout=30).ok
