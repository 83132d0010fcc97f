"""What a busy scheduler does to a pair: caches shared and not, prompts in chunks, requests sent back, cancelled, mixed.

Two servers of one model: as SGLang runs by default (overlap, states kept on the way), and as it runs with neither. Both have memory for
a few requests only, so that they send requests back under load.
"""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import requests

from checkpoints import EOS, confidences, expected, prompt, save_pipo
from pipo import LLM, SamplingParams
from servers import KEEPING_STATES, greedy, serving

MODES = {
    "overlap": {**KEEPING_STATES, "max_total_tokens": 330},
    "no overlap": {
        "mamba_radix_cache_strategy": "no_buffer",
        "disable_overlap_schedule": True,
        "max_mamba_cache_size": 64,
        "max_total_tokens": 300,
    },
}
# Chunks that end within a state's interval, at its end, and beyond.
COMMON = {"log_level": "info", "chunked_prefill_size": 64, "schedule_conservativeness": 0.1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    return save_pipo(folder, "qwen3_5"), folder


@pytest.fixture(scope="module", params=MODES)
def server(request, saved):
    with serving(saved[1], **COMMON, **MODES[request.param]) as running:
        yield running


@pytest.fixture(scope="module")
def model(saved):
    return saved[0]


@pytest.fixture(autouse=True)
def nothing_cached(server):
    server.forget()


LONG = prompt(300, seed=5)


def test_a_prompt_that_the_cache_holds(model, server):
    """The same prompt again, at once and later: what was computed for the first is what the others read."""
    want = expected(model, LONG, 8, 0.5)
    (first,) = server.greedy([LONG], 8, 0.5)
    again = server.greedy([LONG, LONG], 8, 0.5)
    assert [first.token_ids, *(reply.token_ids for reply in again)] == [want] * 3
    assert first.num_cached == 0
    assert all(reply.num_cached >= 256 for reply in again)


@pytest.mark.parametrize("num_shared", [255, 256, 257, 258], ids=lambda n: f"{n} shared tokens")
def test_prompts_that_part(model, server, num_shared):
    """The MTP block's cache at the last shared pair was computed from the other prompt's next token 1. It may not be read.

    A threshold beside the true confidence tells a stale entry: it moves every confidence that comes after it.
    """
    server.greedy([LONG], 1)
    turned = [*LONG[:num_shared], *prompt(3, seed=6)]
    (first,) = confidences(model, turned, 2, 0.0)
    kept, rejected = server.greedy([turned, turned], 2, [first - 2e-4, first + 2e-4])
    assert kept.token_ids == expected(model, turned, 2, 0.0)
    assert rejected.token_ids == expected(model, turned, 2, 1.1)
    assert kept.num_cached >= 128


def test_a_second_turn(model, server):
    """A reply comes back as part of the next prompt, and is read in the pairs in which it was written: the embedded engine's text,
    and a cache that is used far beyond the first rejected draft.
    """
    llm = LLM(model, remember_pairs=10_000)
    question, answer = prompt(100, seed=8), SamplingParams(temperature=0, max_tokens=80, threshold=0.5, ignore_eos=True)
    (first,) = server.greedy([question], 80, 0.5)
    assert first.token_ids == llm.generate({"prompt_token_ids": question}, answer)[0].token_ids
    turned = [*question, *first.token_ids, *prompt(5, seed=9)]
    (second,) = server.greedy([turned], 20, 0.5)
    answer = replace(answer, max_tokens=20)
    assert second.token_ids == llm.generate({"prompt_token_ids": turned}, answer)[0].token_ids
    assert second.num_cached > 110


def test_more_requests_than_fit(model, server):
    """Some are sent back in the middle of their reply, lose what was computed for them, and go on where they were."""
    cases = [(prompt(20 + 9 * i, seed=20 + i), (0.0, 0.5, 1.1)[i % 3]) for i in range(8)]
    # A request that ignores the end of text is let in only where all of its tokens fit.
    params = [greedy(70, tau, ignore_eos=False) for _, tau in cases]
    replies = server.generate([ids for ids, _ in cases], params)
    assert [reply.token_ids for reply in replies] == [expected(model, ids, 70, tau, EOS) for ids, tau in cases]
    assert sum(reply.meta["num_retractions"] for reply in replies) > 0, "nothing was sent back: give it less memory"


def test_requests_that_come_and_go(model, server):
    """Requests of all kinds from many threads, short ones joining long ones: every row stays its own."""
    cases = [(prompt(1 + 17 * i, seed=40 + i), 3 + 5 * (i % 4), (0.5, 0.0, 1.1)[i % 3]) for i in range(10)]
    with ThreadPoolExecutor(6) as threads:
        replies = list(threads.map(lambda case: server.greedy([case[0]], case[1], case[2])[0].token_ids, cases))
    assert replies == [expected(model, *case) for case in cases]


def test_cancelled_requests(model, server):
    """Two are cancelled as they decode, one by its id and one by hanging up; their neighbours and successors notice nothing."""
    neighbours = [(prompt(30, seed=60), 0.5), (prompt(31, seed=61), 0.0)]
    started = threading.Event()

    def stream(seed: int, rid: str, hang_up: bool) -> dict:
        body = {"input_ids": prompt(33, seed=seed), "rid": rid, "stream": True, "sampling_params": greedy(110, 0.5)}
        last = {}
        with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=240) as response:
            for line in response.iter_lines():
                if line.startswith(b"data: {"):
                    last = json.loads(line[6:])
                    if hang_up:
                        break
                    started.set()
        return last

    with ThreadPoolExecutor(3) as threads:
        cancelled = threads.submit(stream, 62, "cancel me", False)
        beside = threads.submit(server.greedy, [ids for ids, _ in neighbours], 40, [tau for _, tau in neighbours])
        hung_up = threads.submit(stream, 63, "hang up", True)
        assert started.wait(120)
        requests.post(f"{server.url}/abort_request", json={"rid": "cancel me"}, timeout=60)
        assert cancelled.result()["meta_info"]["finish_reason"]["type"] == "abort"
        assert hung_up.result()["meta_info"]["finish_reason"] is None
        replies = beside.result()
    after = server.greedy([ids for ids, _ in neighbours], 40, [tau for _, tau in neighbours])
    want = [expected(model, ids, 40, tau) for ids, tau in neighbours]
    assert [reply.token_ids for reply in replies] == want
    assert [reply.token_ids for reply in after] == want
