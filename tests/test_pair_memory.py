"""`pipo.pair_memory`: a prompt that goes on from a reply is read in the reply's pairs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipo.pair_memory import BYTES_PER_TOKEN, PairMemory
from pipo.pairing import Pair, pairs_from_sizes, pairs_from_tokens, tokens_from_pairs

PROMPT = [Pair(1, 2), Pair(3, None)]
REPLY = [Pair(4, None), Pair(5, 6), Pair(7, None)]


def test_a_next_turn_is_packed_as_remembered_but_for_the_last_pair() -> None:
    memory = PairMemory(max_tokens=100)
    memory.remember([*PROMPT, *REPLY])
    packed = memory.pack([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert packed == [*PROMPT, *REPLY[:2], Pair(7, 8), Pair(9, None)]
    assert memory.pack([1, 2, 3]) == PROMPT
    assert memory.pack([9, 1, 2, 3, 4]) == pairs_from_tokens([9, 1, 2, 3, 4])


def test_a_text_that_parts_from_the_reply_keeps_the_pairs_before() -> None:
    """Fails when only whole replies count: a stop string or a stripped thought ends what the next turn holds of it."""
    memory = PairMemory(max_tokens=100)
    memory.remember([*PROMPT, *REPLY])
    assert memory.pack([1, 2, 3, 4, 5, 8, 9]) == [*PROMPT, Pair(4, None), Pair(5, 8), Pair(9, None)]
    # The pair (4, PAD) was cached before 5: before 8 it is of no use, so nothing is gained by leaving a gap.
    assert memory.pack([1, 2, 3, 4, 8, 9]) == [*PROMPT, Pair(4, 8), Pair(9, None)]


def test_the_longest_memory_wins_and_a_later_turn_replaces_the_earlier() -> None:
    memory = PairMemory(max_tokens=100)
    memory.remember([*PROMPT, *REPLY])
    first = memory.num_tokens
    later = [*PROMPT, *REPLY[:2], Pair(7, None), Pair(8, None), Pair(9, None), Pair(10, None)]
    memory.remember(later)
    assert memory.num_tokens == first + 3, "the earlier turn is part of the later one"
    assert memory.pack([*tokens_from_pairs(later), 11]) == [*later[:-1], Pair(10, 11)]
    memory.remember([*PROMPT, *REPLY])
    assert memory.num_tokens == first + 3


def test_plain_pairs_are_not_kept_and_the_oldest_go_first() -> None:
    memory = PairMemory(max_tokens=12)
    memory.remember([Pair(1, 2), Pair(3, 4), Pair(5, None)])
    assert memory.num_tokens == 0
    memory.remember([*PROMPT, *REPLY])
    memory.remember([Pair(20, None), *(Pair(one, None) for one in range(30, 38))])
    assert memory.num_tokens <= 12
    assert memory.pack([1, 2, 3, 4, 5, 6, 7]) == [Pair(1, 2), Pair(3, 4), Pair(5, 6), Pair(7, None)]
    assert memory.pack([20, 30, 31])[0] == Pair(20, None)
    memory.clear()
    assert memory.num_tokens == 0
    assert memory.pack([20, 30, 31])[0] == Pair(20, 30)


def test_what_is_asked_for_is_kept_longest() -> None:
    memory = PairMemory(max_tokens=8)
    for start in (10, 20):
        memory.remember([Pair(start, None), Pair(start + 1, None), Pair(start + 2, None), Pair(start + 3, None)])
    memory.pack([10, 11, 12, 13])
    memory.remember([Pair(30, None), Pair(31, None), Pair(32, None), Pair(33, None)])
    assert memory.pack([10, 11, 12, 13])[0] == Pair(10, None)
    assert memory.pack([20, 21, 22, 23])[0] == Pair(20, 21)


def test_the_bound_in_bytes_holds() -> None:
    """A text costs its tokens and one byte a pair."""
    memory = PairMemory(max_tokens=1000)
    memory.remember([Pair(one, None) for one in range(500)])
    ((text, sizes),) = memory._sizes.items()
    assert len(text) + sizes.nbytes <= BYTES_PER_TOKEN * memory.num_tokens


pair_lists = st.lists(st.builds(Pair, st.integers(0, 2), st.none() | st.integers(0, 2)), max_size=12)


@given(st.lists(pair_lists, max_size=8), st.lists(st.integers(0, 2), max_size=24))
def test_packing_agrees_with_comparing_every_text(texts: list[list[Pair]], prompt: list[int]) -> None:
    """Fails when the neighbour in order is not what shares most, or when tokens are lost."""
    memory = PairMemory(max_tokens=1000)
    for text in texts:
        memory.remember(text)
    packed = memory.pack(prompt)
    assert tokens_from_pairs(packed) == prompt

    def agreeing(text: bytes) -> int:
        kept = [int.from_bytes(text[at : at + 4], "little") for at in range(0, len(text), 4)]
        return next(
            (i for i, (a, b) in enumerate(zip(kept, prompt, strict=False)) if a != b), min(len(kept), len(prompt))
        )

    most = max(map(agreeing, memory._sizes), default=0)
    candidates = []
    for text, sizes in memory._sizes.items():
        if agreeing(text) == most:
            whole, end, shared = len(text) == 4 * most, 0, []
            for size in sizes.tolist():
                end += size
                if end < most or (whole and end == most):
                    shared.append(size)
            rest = pairs_from_tokens(prompt[sum(shared) :])
            candidates.append([*pairs_from_sizes(prompt[: sum(shared)], shared), *rest])
    assert packed in (candidates or [pairs_from_tokens(prompt)])
