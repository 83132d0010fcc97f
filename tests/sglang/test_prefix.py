"""The prefix cache on SGLang: what is shared is what would have been computed, also the MTP block's part; replies are found again."""

import pytest
import requests

from byte_tokenizer import byte_tokenizer
from checkpoints import expected, prompt
from pipo import LLM, SamplingParams

TAU = 0.5
STATE_EVERY = 64
"""Pairs after which a hybrid keeps its linear-attention states."""


@pytest.fixture(params=["llama", "qwen3_5"])
def served(request):
    shared = request.getfixturevalue(request.param)
    return shared.model, shared.server, shared.hybrid


def usable(num_pairs, hybrid):
    return num_pairs // STATE_EVERY * STATE_EVERY if hybrid else num_pairs


def test_prompts_that_part_after_a_shared_pair_share_the_pairs_before_it(served):
    """The MTP block's entry of the last shared pair was computed from the other prompt's next token: it must not be taken over."""
    model, server, hybrid = served
    server.forget()
    shared = prompt(2 * STATE_EVERY + 22, seed=1)
    for tail in ([], [7], [8], [7, 9, 11], [8, 9, 11]):
        ids = [*shared, *tail]
        (reply,) = server.greedy([ids], 20, TAU)
        assert reply.token_ids == expected(model, ids, 20, TAU), tail
        if tail:
            assert reply.num_cached >= 2 * usable(len(shared) // 2 - 1, hybrid)
            assert reply.num_cached < len(ids)


def test_prompts_of_one_batch_share_and_stay_exact(served):
    model, server, _ = served
    for forget in (True, False):
        if forget:
            server.forget()
        long = prompt(151, seed=2)
        prompts = [long[:150], long, [*long[:150], 7, 8, 9], long[:129], long[:130], prompt(5), long[:150]]
        thresholds = [0.0, TAU, TAU, 1.5, TAU, TAU, TAU]
        for ids, tau, reply in zip(prompts, thresholds, server.greedy(prompts, 16, thresholds), strict=True):
            assert reply.token_ids == expected(model, ids, 16, tau)


def test_the_next_turn_goes_on_from_the_reply(served):
    """Beyond the first rejected draft, which the reply's own pairs alone make possible; and writes what the embedded engine writes."""
    model, server, hybrid = served
    server.forget()
    llm = LLM(model, remember_pairs=10_000)
    params = SamplingParams(temperature=0, max_tokens=STATE_EVERY * 2, ignore_eos=True, threshold=TAU)
    ids, before = prompt(37, seed=3), 0
    for turn in range(3):
        (reply,) = server.greedy([ids], 2 * STATE_EVERY, TAU)
        (output,) = llm.generate({"prompt_token_ids": ids}, params)
        assert reply.token_ids == output.token_ids
        assert reply.meta["num_rejected"] > 20, "a reply without gaps shows nothing"
        if hybrid:
            assert turn == 0 or reply.num_cached > before - 2 * STATE_EVERY
        else:
            assert before - 4 <= reply.num_cached <= before
        ids = [*ids, *reply.token_ids]
        before = len(ids)
        ids += prompt(6, seed=turn)


def test_flushing_forgets_pairs_too(served):
    model, server, _ = served
    ids = prompt(21, seed=4)
    (reply,) = server.greedy([ids], 30, TAU)
    server.forget()
    again = [*ids, *reply.token_ids, *prompt(5, seed=9)]
    (second,) = server.greedy([again], 12, TAU)
    assert second.num_cached == 0
    assert second.token_ids == expected(model, again, 12, TAU), "packed two by two"


def test_a_chat_of_two_turns_through_openai_hits_the_first_reply(served):
    """The reply ends with a special token that the template writes too."""
    _, server, hybrid = served
    server.forget()
    messages = [{"role": "user", "content": "Say it again and again, as long as you can, and then once more." * 3}]
    bias = {str(letter): 100 for letter in byte_tokenizer().encode("abcdefghijklmnopqrstuvwxyz")}
    for _ in range(2):
        body = {
            "model": "m", "messages": messages, "max_tokens": 60, "temperature": 0, "logit_bias": bias,
            "custom_params": {"threshold": TAU},
        }  # fmt: skip
        out = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()
        text = out["choices"][0]["message"]["content"]
        assert len(text) == 60
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Go on."}]
        num_prompt = out["usage"]["prompt_tokens"]
    body |= {"messages": messages[:3], "return_cached_tokens_details": True}
    out = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()
    cached = out["sglext"]["cached_tokens_details"]["device"]
    assert num_prompt - 20 - 2 * STATE_EVERY * hybrid < cached < num_prompt
