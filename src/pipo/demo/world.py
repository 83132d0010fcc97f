"""The demo's world: a board game on a ring of 100 squares. No torch, no tokenizer.

A problem names where somebody's piece stands and which cards they hold::

    Ann is on 37. Cards: +5 -8 +12 x3 +4.

Squares are numbered 0 to 99 and square 0 follows square 99. `+5` moves five squares on, `-8` eight squares back, and `x3` three
times as far from square 0. A solution plays every card once, in any order, and says after each one where the piece stands::

    Play -8 29 +4 33 x3 99 +5 4 +12 16

The order is a free choice, and the number depends on that choice: when a pair is (card, first digit), the second token can
only be right if it knows the first. Steps are two or three tokens long, so pairs keep falling on them differently.

Text is made of *pieces* (`PIECES`), each of which the tokenizer keeps as one token.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

Side = Literal["train", "test"]

NUM_SQUARES = 100
MAX_MOVE = 24
MIN_CARDS = 5
MAX_CARDS = 8
FACTORS = (2, 3, 7)
FACTOR_RATE = 0.3
"""Share of the cards that multiply."""

TEST_SHARE = 8
"""One problem in `TEST_SHARE` is a test problem, by its hash."""

PEOPLE = ("Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gus", "Hal", "Ivy", "Jon", "Kim", "Leo")
CARDS = (*(f"{sign}{size}" for sign in "+-" for size in range(1, MAX_MOVE + 1)), *(f"x{factor}" for factor in FACTORS))
OPENING = "Play"

PIECES: tuple[str, ...] = (
    *(str(digit) for digit in range(10)),
    *(f" {digit}" for digit in range(10)),
    *(" is", " on", ".", " Cards", ":", OPENING),
    *PEOPLE,
    *(f" {card}" for card in CARDS),
)
"""Every piece of text that problems and solutions are made of."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Whose piece stands on which square (0 to 99), and the cards to be played, each once."""

    person: str
    start: int
    cards: tuple[str, ...]

    @property
    def pieces(self) -> list[str]:
        """The problem's text as pieces."""
        hand = [f" {card}" for card in self.cards]
        return [self.person, " is", " on", *number_pieces(self.start), ".", " Cards", ":", *hand, "."]

    @property
    def text(self) -> str:
        """The problem as somebody would write it."""
        return "".join(self.pieces)

    @property
    def canonical(self) -> str:
        """What makes two problems the same: the start and the hand, whoever plays and however the hand is ordered."""
        return f"{self.start}: {' '.join(sorted(self.cards))}"

    @property
    def side(self) -> Side:
        """The side of the split that this problem belongs to. Its canonical form alone decides, so no seed can make a
        training problem and a test problem meet."""
        digest = hashlib.sha256(self.canonical.encode()).digest()
        return "test" if int.from_bytes(digest[:8]) % TEST_SHARE == 0 else "train"


def move(square: int, card: str) -> int:
    """Where the piece stands after playing `card` from `square`."""
    return (square * int(card[1:]) if card[0] == "x" else square + int(card)) % NUM_SQUARES


def number_pieces(number: int) -> list[str]:
    """The pieces of a square's number: its first digit carries the space in front."""
    digits = str(number)
    return [f" {digits[0]}", *digits[1:]]


def draw_problem(rng: random.Random, side: Side) -> Problem:
    """Draws a problem of one side of the split."""
    while True:
        hand = [
            f"x{rng.choice(FACTORS)}"
            if rng.random() < FACTOR_RATE
            else rng.choice("+-") + str(rng.randint(1, MAX_MOVE))
            for _ in range(rng.randint(MIN_CARDS, MAX_CARDS))
        ]
        problem = Problem(rng.choice(PEOPLE), rng.randrange(NUM_SQUARES), tuple(hand))
        if problem.side == side:
            return problem


def draw_problems(seed: int, num_problems: int, side: Side) -> list[Problem]:
    """Draws `num_problems` different problems (by their canonical form) of one side."""
    rng = random.Random(f"{side}-{seed}")
    found: dict[str, Problem] = {}
    while len(found) < num_problems:
        problem = draw_problem(rng, side)
        found.setdefault(problem.canonical, problem)
    return list(found.values())


def solve(problem: Problem, rng: random.Random) -> list[str]:
    """A right solution in random order, as pieces."""
    hand = list(problem.cards)
    rng.shuffle(hand)
    pieces, square = [OPENING], problem.start
    for card in hand:
        square = move(square, card)
        pieces += [f" {card}", *number_pieces(square)]
    return pieces


def right_next(problem: Problem, pieces: Sequence[str]) -> frozenset[str] | None:
    """Every piece that may follow `pieces` in a right solution; empty when the solution is complete, None when
    `pieces` are wrong already."""
    walk = _right_pieces(problem)
    expected = next(walk)
    for piece in pieces:
        if piece not in expected:
            return None
        expected = walk.send(piece)
    return expected


def _right_pieces(problem: Problem) -> Generator[frozenset[str], str, None]:
    """Yields what may come next and is sent what came."""
    yield frozenset((OPENING,))
    hand, square = [f" {card}" for card in problem.cards], problem.start
    while hand:
        piece = yield frozenset(hand)
        hand.remove(piece)
        square = move(square, piece[1:])
        for digit in number_pieces(square):
            yield frozenset((digit,))
    yield frozenset()


def is_right(problem: Problem, text: str) -> bool:
    """Whether `text` (without the stop token) solves `problem`: every card once, and every square right."""
    words = text.split(" ")
    if words[0] != OPENING or len(words) != 1 + 2 * len(problem.cards):
        return False
    hand, square = list(problem.cards), problem.start
    for card, number in zip(words[1::2], words[2::2], strict=True):
        if card not in hand:
            return False
        hand.remove(card)
        square = move(square, card)
        if number != str(square):
            return False
    return True
