"""What a busy scheduler does to a pair: prompts that share, requests that come and go, cancelled ones.

Twice: as SGLang runs by default, and without overlap scheduling but with requests sent back all the time.
"""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from checkpoints import confidences, expected, prompt
from servers import greedy


@pytest.fixture(scope="module", params=["qwen3_5", "without_overlap"])
def served(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def server(served):
    served.server.forget()
    return served.server


@pytest.fixture
def model(served):
    return served.model


LONG = prompt(300, seed=5)


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
