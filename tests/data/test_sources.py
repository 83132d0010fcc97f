"""Questions of the real datasets' layouts, in miniature files."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipo.data.sources import MATH_INSTRUCTION, open_questions, trim_tests
from pipo.errors import ConfigError, DataError

MATH = {
    "prompt": "What is 2 + 2?",
    "solution": "4",
    "data_source": "math_dapo",
    "source_prompt": [{"content": "Solve … What is 2 + 2? …", "role": "user"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "4", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
}
CODE = {
    "id": "4/A",
    "aliases": None,
    "contest_id": "4",
    "title": "Watermelon",
    "time_limit": 1.0,
    "memory_limit": 64.0,
    "description": "Can it be divided?",
    "input_format": "One integer.",
    "output_format": "YES or NO.",
    "interaction_format": None,
    "note": "Nothing.",
    "examples": [{"input": "8", "output": "YES"}],
    "official_tests": [{"input": "8\n", "output": "YES\n"}, {"input": "5\n", "output": "NO\n"}],
    "official_tests_complete": True,
    "input_mode": "stdio",
    "generated_checker": None,
    "executable": True,
    "generated_tests": 0,
}


def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_dapo_math(tmp_path):
    file = open_questions(parquet(tmp_path / "f.parquet", [MATH, {**MATH, "prompt": "And 3 + 3?"}]), kind="dapo-math")
    first, second = file
    assert first.messages == [{"role": "user", "content": f"{MATH_INSTRUCTION}\n\nWhat is 2 + 2?"}]
    assert (first.final_answer, first.grader, second.micro_index) == ("4", "math", 1)
    assert file.graders() == {"math"}
    assert (file.count(), file.bad) == (2, [])


def test_a_folder_of_the_dataset_as_a_download_leaves_it(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{**MATH, "prompt": f"{n}?"} for n in range(5)]
    parquet(tmp_path / "dapo" / "en" / "train-00000-of-00001.parquet", rows)
    card = "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/train-*\n---\n"
    (tmp_path / "dapo" / "README.md").write_text(card)
    file = open_questions(tmp_path / "dapo", kind="dapo-math", subset="en")
    assert [question.micro_index for question in file] == list(range(5))
    assert file.count() == 5
    with pytest.raises(DataError, match="can't be loaded"):
        list(open_questions(tmp_path / "dapo", kind="dapo-math", subset="de"))


def test_the_hub_ids_bring_their_layout_and_subset(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, subset, split):
        asked.append((name, subset))
        return [MATH] if "DAPO" in name else [{**CODE, "language": "cpp", "prompt": "In C++: …"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    questions = [
        next(iter(open_questions(name))) for name in ("dapo-math", "open-r1/DAPO-Math-17k-Processed", "codeforces")
    ]
    assert [question.grader for question in questions] == ["math", "math", "code"]
    assert (questions[2].messages[0]["content"], questions[2].metadata["language"]) == ("In C++: …", "cpp")
    assert asked == [("open-r1/DAPO-Math-17k-Processed", "all")] * 2 + [("open-r1/codeforces", "verifiable-prompts")]


def test_codeforces_without_a_prompt_gets_one(tmp_path):
    (question,) = open_questions(lines(tmp_path / "f.jsonl", [CODE]), kind="codeforces")
    text = question.messages[0]["content"]
    for part in (
        "```python block",
        "Can it be divided?",
        "## Input\nOne integer.",
        "8",
        "YES",
        "1 seconds, 64 megabytes",
    ):
        assert part in text
    assert question.metadata == {
        "problem_id": "4/A",
        "language": "python",
        "tests": CODE["official_tests"],
        "time_limit_s": 1.0,
        "memory_limit_bytes": 64 * 2**20,
    }


@pytest.mark.parametrize(
    ("change", "grader", "metadata"),
    [
        ({"official_tests": []}, "code", {"tests": CODE["examples"]}),
        ({"official_tests": None, "examples": None}, None, {}),
        ({"interaction_format": "Ask, and be answered."}, None, {}),
        ({"executable": False}, None, {}),
        ({"input_mode": "file"}, "code", {"input_file": "input.txt", "output_file": "output.txt"}),
        ({"generated_checker": "print(1)"}, "code", {"checker": "print(1)"}),
    ],
)
def test_what_no_test_can_check_has_no_grader(tmp_path, change, grader, metadata):
    (question,) = open_questions(lines(tmp_path / "f.jsonl", [{**CODE, **change}]), kind="codeforces")
    assert question.grader == grader
    assert question.metadata.items() >= metadata.items()


def test_rows_that_are_no_question_are_named_by_line(tmp_path):
    rows = [MATH, {"prompt": "?", "reward_model": None}, {"solution": "4"}, MATH]
    file = open_questions(lines(tmp_path / "f.jsonl", rows), kind="dapo-math")
    assert [question.micro_index for question in file] == [0, 3]
    assert [(bad.line, bad.reason[:10]) for bad in file.bad] == [(2, "neither re"), (3, "prompt: Fi")]
    with pytest.raises(DataError, match="2 of 4 rows are no question: line 2"):
        file.check()


def test_plain_questions_may_leave_out_where_they_are_from(tmp_path):
    own = {"messages": [{"role": "user", "content": "?"}], "dataset": "mine", "micro_index": 9, "grader": "cards"}
    path = lines(
        tmp_path / "f.jsonl", [{"prompt": "?", "final_answer": 4, "grader": "math"}, own, {"dataset": "no question"}]
    )
    file = open_questions(path)
    first, second = file
    assert (first.dataset, first.micro_index, first.final_answer) == (str(path), 0, "4")
    assert (second.dataset, second.micro_index) == ("mine", 9)
    assert [bad.line for bad in file.bad] == [3]
    assert file.graders() == {"math", "cards"}


def test_an_unknown_layout():
    with pytest.raises(ConfigError, match="dapo-math, codeforces, questions"):
        open_questions("f.jsonl", kind="parquet")


def test_tests_are_trimmed_and_counted():
    tests = [{"input": "1" * size, "output": ""} for size in (5, 50, 4)]
    assert trim_tests({"tests": tests}, 10) == {"tests": [tests[0]], "num_tests": 3}
    assert trim_tests({"tests": tests}, 100) == {"tests": tests, "num_tests": 3}
    assert trim_tests({"other": 1}, 10) == {"other": 1}
