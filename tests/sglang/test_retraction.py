"""Requests that SGLang sends back for want of memory, and goes on with later: they write what they would have written."""

import pytest

from checkpoints import EOS, expected, prompt
from served import TIGHT, start
from servers import greedy


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
