"""The tiny world as a source of questions with a grader, for the commands that make training data."""

from __future__ import annotations

from pipo.data.grade import Grade
from pipo.data.rows import Checked, Question
from pipo.demo.world import Problem, Side, draw_problems, is_right

DATASET = "tiny-world"
GRADER = "cards"


def card_questions(num_questions: int, seed: int, side: Side = "train") -> list[Question]:
    """Different problems of one side of the split, each as a user's message."""
    return [
        Question(
            messages=[{"role": "user", "content": problem.text}],
            dataset=DATASET,
            micro_index=index,
            grader=GRADER,
            metadata={"person": problem.person, "start": problem.start, "cards": list(problem.cards)},
        )
        for index, problem in enumerate(draw_problems(seed, num_questions, side))
    ]


class CardsGrader:
    """Checks a solution of the tiny world: every card once, and every square right."""

    def grade(self, question: Checked, text: str) -> Grade:
        """As `Grader.grade`."""
        about = question.metadata
        try:
            problem = Problem(str(about["person"]), int(about["start"]), tuple(about["cards"]))
        except (KeyError, TypeError, ValueError) as error:
            return Grade(False, error=f"the metadata hold no problem of the tiny world: {error!r}")
        return Grade(is_right(problem, text), text)
