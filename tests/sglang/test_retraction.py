"""Requests that SGLang sends back for want of memory, and goes on with later: they write what they would have written."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from checkpoints import expected, prompt, save_pipo
from servers import KEEPING_STATES, greedy, serving


@pytest.fixture(scope="module", params=["llama", "qwen3_5"])
def served(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("retraction") / "model"
    model = save_pipo(folder, request.param)
    options = KEEPING_STATES if request.param == "qwen3_5" else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_TEST_RETRACT", "1")
        patch.setenv("SGLANG_TEST_RETRACT_INTERVAL", "5")
        with serving(folder, incremental_streaming_output=True, **options) as server:
            yield model, server


def test_what_was_written_survives(served):
    """Tokens, counts, penalties and the pairing; with stops, log-probabilities and streams' offsets beside them."""
    model, server = served
    prompts = [prompt(5 + 9 * index, seed=index) for index in range(6)]
    thresholds = [0.0, 0.5, 1.5, 0.5, 0.5, 0.0]
    params = [greedy(30, tau) for tau in thresholds]
    replies = server.generate(prompts, params, return_logprob=True, logprob_start_len=-1)
    assert sum(reply.meta["num_retractions"] for reply in replies) > 0
    for reply, ids, tau in zip(replies, prompts, thresholds, strict=True):
        assert reply.token_ids == expected(model, ids, 30, tau)
        assert [token for _, token, _ in reply.meta["output_token_logprobs"]] == reply.token_ids
        assert reply.meta["completion_tokens"] == 30
        assert reply.meta["num_pairs"] + reply.meta["num_committed"] == 30


def test_streams_go_on_where_they_were(served):
    """Each chunk holds what is new, before and after."""
    model, server = served
    prompts = [prompt(8 + 5 * index, seed=30 + index) for index in range(4)]

    def chunks_of(ids):
        body = {"input_ids": ids, "sampling_params": greedy(24, 0.5), "stream": True}
        with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=120) as response:
            lines = [line[6:] for line in response.iter_lines() if line.startswith(b"data: {")]
        return [json.loads(line) for line in lines]

    with ThreadPoolExecutor(len(prompts)) as pool:
        streams = list(pool.map(chunks_of, prompts))
    assert sum(chunks[-1]["meta_info"]["num_retractions"] for chunks in streams) > 0
    for ids, chunks in zip(prompts, streams, strict=True):
        assert [token for chunk in chunks for token in chunk["output_ids"]] == expected(model, ids, 24, 0.5)
        assert max(len(chunk["output_ids"]) for chunk in chunks[:-1]) <= 4
