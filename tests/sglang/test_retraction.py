"""Requests that SGLang sends back for want of memory, and goes on with later: they write what they would have written."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from checkpoints import EOS, expected, prompt, save_pipo
from served import TIGHT, start
from servers import greedy, serving


@pytest.fixture(scope="module")
def tight(tmp_path_factory):
    """Memory for some of the requests that are let in."""
    with start(tmp_path_factory.mktemp("tight"), TIGHT) as served:
        yield served


@pytest.mark.parametrize("how", ["tight", "without_overlap"])
def test_what_was_written_survives(how, request):
    """Tokens, counts, log-probabilities and the pairing."""
    served = request.getfixturevalue(how)
    cases = [(prompt(20 + 9 * i, seed=20 + i), (0.0, 0.5, 1.1)[i % 3]) for i in range(8)]
    # A request that ignores the end of text is let in only where all of its tokens fit.
    params = [greedy(70, tau, ignore_eos=False) for _, tau in cases]
    replies = served.server.generate([ids for ids, _ in cases], params, return_logprob=True, logprob_start_len=-1)
    assert sum(reply.meta["num_retractions"] for reply in replies) > 0
    for reply, (ids, tau) in zip(replies, cases, strict=True):
        assert reply.token_ids == expected(served.model, ids, 70, tau, EOS)
        assert [token for _, token, _ in reply.meta["output_token_logprobs"]] == reply.token_ids
        assert reply.meta["completion_tokens"] == len(reply.token_ids)
        assert reply.meta["num_pairs"] + reply.meta["num_committed"] == len(reply.token_ids)


@pytest.fixture(scope="module")
def streaming(tmp_path_factory):
    """Each chunk of a stream holds what is new; requests are sent back every fifth step."""
    folder = tmp_path_factory.mktemp("streams") / "model"
    model = save_pipo(folder, "llama")
    often = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "5"}
    with serving(folder, often, incremental_streaming_output=True) as server:
        yield model, server


def test_streams_go_on_where_they_were(streaming):
    """Each chunk holds what is new, before and after."""
    model, server = streaming
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
