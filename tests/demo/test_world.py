"""The world: its solutions are right, its checkers agree, and the two sides of the split never meet."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from pipo.demo.world import (
    NUM_SQUARES,
    PIECES,
    Problem,
    draw_problem,
    draw_problems,
    is_right,
    right_next,
    solve,
)

seeds = st.integers(0, 10**9)
EXAMPLE = Problem("Ann", 37, ("+5", "-8", "+70", "x2", "-8"))


@given(seeds)
@settings(max_examples=200, deadline=None)
def test_solutions_are_right_and_made_of_pieces(seed: int) -> None:
    rng = random.Random(seed)
    problem = draw_problem(rng, "train")
    solution = solve(problem, rng)
    assert is_right(problem, "".join(solution))
    assert {*problem.pieces, *solution} <= set(PIECES)
    for index, piece in enumerate(solution):
        assert piece in (right_next(problem, solution[:index]) or ())
    assert right_next(problem, solution) == frozenset()


@given(seeds, st.data())
@settings(max_examples=200, deadline=None)
def test_both_checkers_agree_about_a_changed_piece(seed: int, data: st.DataObject) -> None:
    rng = random.Random(seed)
    problem = draw_problem(rng, "train")
    solution = solve(problem, rng)
    solution[data.draw(st.integers(0, len(solution) - 1))] = data.draw(st.sampled_from(PIECES))
    assert is_right(problem, "".join(solution)) == (right_next(problem, solution) == frozenset())


@given(seeds)
@settings(max_examples=100, deadline=None)
def test_following_the_right_pieces_solves_the_problem(seed: int) -> None:
    rng = random.Random(seed)
    problem = draw_problem(rng, "test")
    pieces: list[str] = []
    while allowed := right_next(problem, pieces):
        pieces.append(rng.choice(sorted(allowed)))
    assert is_right(problem, "".join(pieces))


def test_a_solution_by_hand() -> None:
    assert EXAMPLE.text == "Ann is on 37. Cards: +5 -8 +70 x2 -8."
    assert is_right(EXAMPLE, "Play -8 29 +70 99 x2 98 +5 3 -8 95")
    for wrong in (
        "Play -8 29 +70 99 x2 98 +5 3",
        "Play -8 29 +70 99 x2 98 +5 3 -8 95 -8 87",
        "Play -8 29 +70 99 x2 98 +5 03 -8 95",
        "Play -8 29 +70 99 x2 98 +5 3 -8 94",
        "-8 29 +70 99 x2 98 +5 3 -8 95",
        "Play  -8 29 +70 99 x2 98 +5 3 -8 95",
        "",
    ):
        assert not is_right(EXAMPLE, wrong)
    assert right_next(EXAMPLE, ["Play"]) == {" +5", " -8", " +70", " x2"}
    assert right_next(EXAMPLE, ["Play", " -8", " 2"]) == {"9"}
    assert right_next(EXAMPLE, ["Play", " -8", " 2", "9"]) == {" +5", " -8", " +70", " x2"}
    assert right_next(EXAMPLE, ["Play", " -8", " 3"]) is None


def test_the_sides_never_meet() -> None:
    train, test = (draw_problems(3, 300, side) for side in ("train", "test"))
    assert not {problem.canonical for problem in train} & {problem.canonical for problem in test}
    assert all(problem.side == "test" for problem in test)
    renamed = Problem("Bob", EXAMPLE.start, EXAMPLE.cards[::-1])
    assert (renamed.canonical, renamed.side) == (EXAMPLE.canonical, EXAMPLE.side)


def test_a_seed_draws_the_same_and_another_seed_draws_others() -> None:
    assert draw_problems(1, 20, "test") == draw_problems(1, 20, "test")
    first, second = ({p.canonical for p in draw_problems(seed, 50, "test")} for seed in (1, 2))
    assert len(first) == 50
    assert not first & second
    assert all(0 <= problem.start < NUM_SQUARES for problem in draw_problems(1, 50, "test"))
