"""Where questions come from: DAPO-Math, Codeforces, and any file of `Question` rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError, field_validator

from pipo.data.records import BadRow, RowFile, count_rows, is_local, refuse_bad
from pipo.data.rows import Question, Row, Test, explain, parse_mapping
from pipo.errors import ConfigError

MATH_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
"""What Qwen recommends for mathematics; it stands before the question."""
KEPT_TESTS_BYTES = 64 * 1024
"""Tests that a row of a rollout file keeps of a question; all of them together weigh gigabytes."""


class MathRow(Row):
    """A row of DAPO-Math as `open-r1/DAPO-Math-17k-Processed` has it."""

    prompt: str
    solution: str | None = None
    reward_model: dict[str, Any] | None = None

    _parse = field_validator("reward_model", mode="before")(parse_mapping)

    def to_question(self, dataset: str, index: int) -> Question:
        """The question, checked by its final answer.

        Raises:
            ValueError: the row has no answer.
        """
        answer = (self.reward_model or {}).get("ground_truth", self.solution)
        if answer is None:
            raise ValueError("neither reward_model.ground_truth nor solution: no answer to check against")
        return Question(
            messages=[{"role": "user", "content": f"{MATH_INSTRUCTION}\n\n{self.prompt}"}],
            dataset=dataset,
            micro_index=index,
            final_answer=answer,
            grader="math",
        )


class CodeRow(Row):
    """A row of Codeforces as `open-r1/codeforces` has it; its subset `verifiable-prompts` brings language and prompt."""

    id: str
    title: str = ""
    description: str | None = None
    input_format: str | None = None
    output_format: str | None = None
    interaction_format: str | None = None
    note: str | None = None
    examples: list[Test] | None = None
    official_tests: list[Test] | None = None
    time_limit: float | None = None
    """Seconds."""
    memory_limit: float | None = None
    """Megabytes."""
    input_mode: str | None = None
    generated_checker: str | None = None
    executable: bool | None = None
    language: str | None = None
    prompt: str | None = None

    def to_question(self, dataset: str, index: int) -> Question:
        """The question, checked by the tests at hand: the official ones, or the examples where there are none.

        What no test can check (an interactive problem, one without tests) has no grader.

        Raises:
            ValueError: the row has neither a prompt nor a description.
        """
        tests = self.official_tests or self.examples or []
        checkable = bool(tests) and not self.interaction_format and self.executable is not False
        metadata = {
            "problem_id": self.id,
            "language": self.language or "python",
            "tests": [{"input": test.input, "output": test.output} for test in tests],
            "time_limit_s": self.time_limit,
            "memory_limit_bytes": None if self.memory_limit is None else int(self.memory_limit * 2**20),
            "checker": self.generated_checker or None,
        }
        if self.input_mode == "file":
            metadata |= {"input_file": "input.txt", "output_file": "output.txt"}
        return Question(
            messages=[{"role": "user", "content": self.prompt or self._write_prompt()}],
            dataset=dataset,
            micro_index=index,
            grader="code" if checkable else None,
            metadata={key: value for key, value in metadata.items() if value is not None},
        )

    def _write_prompt(self) -> str:
        if not self.description:
            raise ValueError("neither prompt nor description: nothing to ask")
        parts = [f"# {self.title}", self.description]
        headed = [
            ("Input", self.input_format),
            ("Output", self.output_format),
            ("Interaction", self.interaction_format),
        ]
        parts += [f"## {head}\n{text}" for head, text in headed if text]
        for number, example in enumerate(self.examples or [], 1):
            parts.append(f"## Example {number}\n```input\n{example.input}\n```\n```output\n{example.output}\n```")
        parts += [f"## Note\n{self.note}"] if self.note else []
        limits = [f"{self.time_limit:g} seconds"] if self.time_limit else []
        limits += [f"{self.memory_limit:g} megabytes"] if self.memory_limit else []
        parts += [f"Limits: {', '.join(limits)}."] if limits else []
        where = (
            "input.txt and writes output.txt"
            if self.input_mode == "file"
            else "standard input and writes standard output"
        )
        opening = (
            f"Write a program in {self.language or 'Python'} that solves the problem below. It reads {where}. Reason step by "
            f"step, and end with the whole program in one ```{self.language or 'python'} block."
        )
        return "\n\n".join([opening, *parts])


@dataclass(frozen=True)
class Source:
    """A kind of question file, and the dataset on the hub that is of that kind."""

    row: type[Any]
    hub_id: str | None = None
    subset: str | None = None
    grader: str | None = None
    """What checks its questions; `None` where each question says so itself."""


SOURCES = {
    "dapo-math": Source(MathRow, "open-r1/DAPO-Math-17k-Processed", "all", "math"),
    "codeforces": Source(CodeRow, "open-r1/codeforces", "verifiable-prompts", "code"),
    "questions": Source(Row),
}


class QuestionFile:
    """The questions of a source, made as they are read: iterate for them, in order.

    Rows that are no question stand in `bad`, of the latest iteration.
    """

    def __init__(self, rows: RowFile[Any], dataset: str, source: Source) -> None:
        self._rows = rows
        self.dataset = dataset
        self.source = source
        self._bad: list[BadRow] = []

    @property
    def bad(self) -> list[BadRow]:
        """Rows that are no question, so far."""
        return sorted([*self._bad, *self._rows.bad], key=lambda bad: bad.line)

    def __iter__(self) -> Iterator[Question]:
        self._bad = []
        for line, row in self._rows:
            try:
                question = _to_question(row, self.dataset, self._rows.num_read - 1)
            except ValidationError as error:
                self._bad.append(BadRow(line, explain(error)))
            except ValueError as error:
                self._bad.append(BadRow(line, str(error)))
            else:
                yield question

    def graders(self, num: int | None = None) -> set[str] | None:
        """The names of the graders that the first `num` questions need, `None` where there is no question.

        Reads them all, so that `check` knows of every row that is wrong before anything is asked of a teacher.

        Raises:
            DataError: the source can't be read.
        """
        names = {question.grader for question in islice(self, num)}
        return {name for name in names if name is not None} if names else None

    def check(self) -> None:
        """Refuse what is no question.

        Raises:
            DataError: the message names the first rows by line.
        """
        refuse_bad(self._rows.source, self.bad, self._rows.num_read, "question")

    def count(self) -> int:
        """Rows of the source, the bad ones too. Reads no row where the source says how many it has.

        Raises:
            DataError: the source can't be read.
        """
        return count_rows(self._rows.source, split=self._rows.split, subset=self._rows.subset)


def open_questions(
    source: str | Path, *, kind: str | None = None, split: str = "train", subset: str | None = None
) -> QuestionFile:
    """The questions of a named source, a file, or a dataset on the hub.

    Args:
        source: `dapo-math` or `codeforces`, which stand for their datasets on the hub; or a file, folder or hub id.
        kind: how rows are laid out, a name in `SOURCES`. By default that of the named dataset, else `questions`.
        split, subset: of a dataset on the hub or a folder. A named dataset has a default subset.

    Raises:
        ConfigError: there is no such kind.
    """
    text = str(source)
    named = {known.hub_id: name for name, known in SOURCES.items() if known.hub_id}
    if text in SOURCES and SOURCES[text].hub_id and not Path(text).exists():
        kind, text = kind or text, str(SOURCES[text].hub_id)
    kind = kind or named.get(text, "questions")
    if kind not in SOURCES:
        raise ConfigError(f"questions can be laid out as {', '.join(SOURCES)}, got {kind!r}")
    known = SOURCES[kind]
    if subset is None and text == known.hub_id and not is_local(text):
        subset = known.subset
    rows = RowFile(text, known.row, split, subset)
    return QuestionFile(rows, text, known)


def _to_question(row: Any, dataset: str, index: int) -> Question:
    """The question of a row, or a row that is a question already, but may leave out where it is from."""
    if isinstance(row, MathRow | CodeRow):
        return row.to_question(dataset, index)
    return Question.model_validate({"dataset": dataset, "micro_index": index, **(row.model_extra or {})})


def trim_tests(metadata: dict[str, Any], max_bytes: int) -> dict[str, Any]:
    """Metadata with as many tests as fit into `max_bytes`, from the first; `num_tests` says how many there are in all."""
    tests = metadata.get("tests")
    if not isinstance(tests, list):
        return metadata
    kept, size = [], 0
    for test in tests:
        size += len(test["input"]) + len(test["output"])
        if size <= max_bytes:
            kept.append(test)
    return {**metadata, "tests": kept, "num_tests": len(tests)}
