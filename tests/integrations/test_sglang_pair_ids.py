"""Pairs as ids: what goes in comes out, on the host and on the device, up to the largest vocabulary."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from pipo.errors import UnsupportedModelError
from pipo.integrations.sglang import pair_ids
from pipo.pairing import Pair, pairs_from_sizes

LAST = pair_ids.MAX_VOCAB_SIZE - 1
"""The largest token id."""


def texts():
    draw = random.Random(0)
    for length in (1, 2, 3, 50):
        sizes = [draw.choice([1, 2]) for _ in range(length)]
        yield [draw.choice([0, 1, LAST, draw.randrange(LAST)]) for _ in range(sum(sizes))], sizes


@pytest.mark.parametrize(("tokens", "sizes"), list(texts()))
def test_a_text_comes_back_and_each_pair_knows_the_next(tokens, sizes):
    ids = pair_ids.ids_of(tokens, np.array(sizes, dtype=np.uint8))
    pairs = pairs_from_sizes(tokens, sizes)
    assert min(ids) >= 0, "the prefix tree wants no negative ids"
    assert [pair_ids.pair_of(one) for one in ids] == pairs
    assert pair_ids.tokens_of(ids) == tokens
    assert pair_ids.sizes_of(ids).tolist() == sizes
    assert [pair_ids.next_token1(one) for one, _ in pairwise(ids)] == [after.token1 for _, after in pairwise(pairs)]
    assert pair_ids.next_token1(ids[-1]) == pair_ids.NO_TOKEN


def test_an_id_takes_what_follows_once_that_is_known():
    one = pair_ids.pair_id(LAST, None)
    for following in (5, 0, LAST):
        one = pair_ids.followed_by(one, following)
        assert pair_ids.next_token1(one) == following
        assert pair_ids.pair_of(one) == Pair(LAST, None)
        assert 0 <= one < 2**63


def test_the_device_writes_the_same_ids():
    token1_N, token2_N = torch.tensor([3, LAST, 0], dtype=torch.int32), torch.tensor([9, LAST, 0], dtype=torch.int32)
    ids_N = pair_ids.join(token1_N, token2_N, torch.tensor([False, True, True]))
    assert ids_N.tolist() == [pair_ids.pair_id(3, None), pair_ids.pair_id(LAST, LAST), pair_ids.pair_id(0, 0)]
    assert pair_ids.slots(ids_N, pad_id=7).tolist() == [[3, 7], [LAST, LAST], [0, 0]]


def test_a_vocabulary_that_does_not_fit_is_refused():
    pair_ids.refuse_vocabulary(pair_ids.MAX_VOCAB_SIZE)
    with pytest.raises(UnsupportedModelError, match="do not fit"):
        pair_ids.refuse_vocabulary(pair_ids.MAX_VOCAB_SIZE + 1)
