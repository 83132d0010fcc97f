"""Whether an answer is right: what graders say, and what they are. `pipo.evaluation.grading` has them; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pipo.data.rows import Checked


@dataclass(frozen=True, slots=True)
class Grade:
    """What a grader says about one completion."""

    correct: bool
    extracted: str | None = None
    """The answer that was found in the completion; `None` where there is none, which is wrong."""
    error: str | None = None
    """Why nothing could tell: the sandbox failed, or the check took too long. Then `correct` is False and means nothing."""

    @property
    def accuracy(self) -> float | None:
        """1 right, 0 wrong, `None` where nothing could tell."""
        return None if self.error is not None else float(self.correct)


class Grader(Protocol):
    """Checks completions. Any thread may call it, several at once."""

    def grade(self, question: Checked, text: str) -> Grade:
        """Whether `text`, a whole completion with its `<think>` block, answers `question`."""
        ...
