"""What of a prompt fits, in pairs. No server: the scheduler is two numbers."""

from array import array
from types import SimpleNamespace

import numpy as np
import pytest

from pipo.integrations.sglang import lengths, pair_ids
from pipo.integrations.sglang.requests import PairRequest

ROOM = 10


@pytest.fixture
def scheduler(monkeypatch):
    serving = SimpleNamespace(allow_auto_truncate=False)
    monkeypatch.setattr("sglang.srt.runtime_context.get_serving", lambda: serving)
    return SimpleNamespace(max_req_input_len=ROOM + 1, serving=serving)


class Request(SimpleNamespace):
    def set_finish_with_abort(self, message):
        self.message = message


def request(num_tokens, sizes):
    prompt = array("q", range(5, 5 + num_tokens))
    sizes = np.array(sizes, dtype=np.uint8)
    return Request(pairs=PairRequest(prompt, 0.5, sizes), origin_input_ids=pair_ids.ids_of(prompt, sizes), message=None)


def test_a_remembered_reply_with_too_many_gaps_is_read_two_by_two(scheduler):
    """Fails when the memory of pairs makes a prompt too long that fits without."""
    req = request(16, [1] * 16)
    lengths.fit_prompt(scheduler, req)
    assert req.message is None
    assert req.pairs.sizes.tolist() == [2] * 8
    assert pair_ids.tokens_of(req.origin_input_ids) == list(range(5, 21))


def test_what_fits_stays_as_it_is(scheduler):
    req = request(10, [1] * 10)
    lengths.fit_prompt(scheduler, req)
    assert req.pairs.sizes.tolist() == [1] * 10


@pytest.mark.parametrize("truncate", [False, True])
def test_what_does_not_fit_is_refused_or_cut(scheduler, truncate):
    """Cut where the server was told to: the end then counts as not followed by anything, as the MTP block needs it."""
    scheduler.serving.allow_auto_truncate = truncate
    req = request(25, [2] * 12 + [1])
    lengths.fit_prompt(scheduler, req)
    if not truncate:
        assert req.message == "the prompt has 25 tokens, 13 pairs; 10 pairs fit, up to 20 tokens"
        return
    assert req.message is None
    assert pair_ids.tokens_of(req.origin_input_ids) == list(req.pairs.prompt) == list(range(5, 25))
    assert pair_ids.next_token1(req.origin_input_ids[-1]) == pair_ids.NO_TOKEN
