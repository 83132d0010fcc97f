"""`reject_drafts`: what a rejecting gate makes of a solution, rule by rule."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipo.errors import PairingError
from pipo.pairing import IGNORE_INDEX, Slots, reject_drafts, slots_from_turns, teacher_tokens

PAD = 0
tokens = st.lists(st.integers(1, 50), min_size=1, max_size=12)
turns = st.lists(tokens, min_size=2, max_size=6).map(lambda t: [(ids, i % 2 == 1) for i, ids in enumerate(t)])


@given(turns, st.floats(0, 1), st.integers(0, 1000))
def test_tokens_survive_and_every_draft_keeps_its_label(
    turns: list[tuple[list[int], bool]], ratio: float, seed: int
) -> None:
    plain = slots_from_turns(turns, PAD)
    laid: Slots = reject_drafts(plain, ratio, random.Random(seed), PAD)
    assert teacher_tokens(laid) == teacher_tokens(plain)
    for first in range(0, len(laid.ids), 2):
        token1, token2 = laid.ids[first : first + 2]
        label1, label2 = laid.labels[first : first + 2]
        assert label1 in (token1, IGNORE_INDEX)
        assert laid.filler[first + 1] == (token2 == PAD)
        if laid.filler[first + 1] and label2 != IGNORE_INDEX:  # rejected: written again as the next token 1
            assert laid.ids[first + 2] == label2
        elif label2 != IGNORE_INDEX:
            assert label2 == token2


def test_by_hand() -> None:
    slots = slots_from_turns([([9, 9, 9], False), ([1, 2, 3, 4, 5], True)], PAD)
    assert reject_drafts(slots, 0.0, random.Random(0), PAD) == slots
    never = reject_drafts(slots, 1.0, random.Random(0), PAD)
    assert never.ids == [9, 9, 9, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0]
    assert never.labels == [*[-100] * 4, 1, 2, 2, 3, 3, 4, 4, 5, 5, -100]
    some = {tuple(reject_drafts(slots, 0.5, random.Random(seed), PAD).ids) for seed in range(50)}
    assert (9, 9, 9, 0, 1, 0, 2, 3, 4, 5) in some


def test_what_follows_an_odd_turn_stays_unsupervised() -> None:
    """Breaks when the first token after a turn, which shares the turn's last pair, is learned as the turn's own."""
    slots = slots_from_turns([([9, 9], False), ([1, 2, 3], True), ([8, 7], False), ([4, 5], True)], PAD)
    assert slots.ids == [9, 9, 1, 2, 3, 8, 7, PAD, 4, 5]
    for seed in range(20):
        laid = reject_drafts(slots, 0.5, random.Random(seed), PAD)
        assert teacher_tokens(laid) == teacher_tokens(slots)
        learned = {label for label in laid.labels if label != IGNORE_INDEX}
        assert learned == {1, 2, 3, 4, 5}
    assert reject_drafts(slots, 0.0, random.Random(0), PAD) == slots
    # No gate judges a token that is given: it keeps its place.
    never = reject_drafts(slots, 1.0, random.Random(0), PAD)
    assert never.ids == [9, 9, 1, PAD, 2, PAD, 3, 8, 7, PAD, 4, PAD, 5, PAD]


def test_a_ratio_out_of_range_is_refused() -> None:
    with pytest.raises(PairingError, match=r"1\.5"):
        reject_drafts(slots_from_turns([([1, 2], True)], PAD), 1.5, random.Random(0), PAD)
