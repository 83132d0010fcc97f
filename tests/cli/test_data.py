"""From questions to training rows by the command line, with the demo's teacher and with a server."""

import json
from pathlib import Path

import pytest

import pipo.demo
from stub_server import StubServer, reply

TEACHER = Path(pipo.demo.__file__).parent / "checkpoints" / "teacher"


def report_of(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def questions(run, tmp_path):
    path = tmp_path / "q.jsonl"
    assert (
        report_of(run("data", "questions", "tiny-world", "--num", 20, "--seed", 3, "-o", path, "--json"))[
            "num_questions"
        ]
        == 20
    )
    return path


def test_the_tiny_worlds_data_end_to_end(run, tmp_path, questions):
    rollouts, sft, opd = (tmp_path / name for name in ("r.jsonl", "sft.jsonl", "opd.jsonl"))
    command = (
        "data",
        "rollout",
        questions,
        "-o",
        rollouts,
        "--model",
        TEACHER,
        "--method",
        "regular",
        "-k",
        2,
        "--json",
    )
    collected = report_of(run(*command, "--num-questions", 20))
    assert (collected["num_done"], collected["num_samples"], collected["num_graded"]) == (20, 40, 40)
    assert collected["accuracy"] > 0.5
    again = report_of(run(*command, "--num-questions", 20))
    assert (again["num_before"], again["num_done"]) == (20, 0)

    report = report_of(run("data", "sft", rollouts, "-o", sft, "--json"))
    assert report["num_candidates"] == 40 == report["num_kept"] + sum(report["dropped"].values())
    assert report["dropped"]["question is for OPD"] == 4
    assert {row["messages"][1]["content"].split()[0] for row in rows_of(sft)} == {"Play"}
    report = report_of(run("data", "opd", rollouts, "-o", opd, "--min-accuracy", 0, "--json"))
    assert (report["num_kept"], report["dropped"]) == (2, {"question is for SFT": 18})
    (first, _) = rows_of(opd)
    assert (first["grader"], set(first["metadata"])) == ("cards", {"person", "start", "cards"})
    assert {row["source_index"] for row in rows_of(sft)} & {row["source_index"] for row in rows_of(opd)} == set()

    shown = run("data", "sft", rollouts, "-o", sft)
    assert "in the rollouts" in shown.stdout
    assert "question is for OPD" in shown.stdout


def test_a_server_is_asked_with_the_options_and_the_key(run, tmp_path, questions, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with StubServer(lambda request, _: reply("Play")) as server:
        result = run(
            *("data", "rollout", questions, "-o", tmp_path / "r.jsonl", "--endpoint", server.url, "--model", "teacher"),
            *("--num-questions", 2, "-k", 3, "--temperature", 0.7, "--top-k", 20, "--max-tokens", 50),
            *("--template-option", "enable_thinking=false", "--thinking-prefix", "<think>\\n", "--json"),
        )
    assert report_of(result)["num_samples"] == 6
    request = server.requests[0]
    asked = {name: request[name] for name in ("model", "temperature", "top_k", "max_tokens", "chat_template_kwargs")}
    assert asked == {
        "model": "teacher",
        "temperature": 0.7,
        "top_k": 20,
        "max_tokens": 50,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert len({request["seed"] for request in server.requests}) == 6
    row = rows_of(tmp_path / "r.jsonl")[0]
    assert row["completion_texts"] == ["<think>\nPlay"] * 3
    assert row["n_pads"] == [2] * 3
    meta = (tmp_path / "r.jsonl.meta.json").read_text()
    assert "secret" not in meta
    assert json.loads(meta)["sampling"] == {"temperature": 0.7, "top_k": 20, "max_tokens": 50}


def test_rows_that_are_no_question_end_it_before_the_teacher_is_asked(run, tmp_path):
    source, out = tmp_path / "q.jsonl", tmp_path / "r.jsonl"
    tests = {"tests": [{"input": 1, "output": "1"}]}
    lines = ['{"prompt": "2 + 2?"}', '{"nothing": 1}', json.dumps({"prompt": "?", "grader": "code", "metadata": tests})]
    source.write_text("\n".join(lines))
    with StubServer(lambda *_: reply()) as server:
        command = ("data", "rollout", source, "-o", out, "--endpoint", server.url, "--model", "m")
        result = run(*command)
        assert result.exit_code == 2
        assert "2 of 3 rows are no question: line 2: messages: Field required; line 3: metadata for" in result.stderr
        assert "tests.0.input: Input should be a valid string" in result.stderr
        assert server.requests == []
        assert not out.exists()
        skipped = report_of(run(*command, "--skip-bad-rows", "--json"))
    assert [row["line"] for row in skipped["bad"]] == [2, 3]
    assert len(rows_of(out)) == 1
    result = run("data", "questions", source, "-o", out, "--skip-bad-rows")
    assert "1 questions in" in result.stdout
    assert "2 bad rows are skipped" in result.stderr
    assert run("data", "questions", source, "-o", out).exit_code == 2


def test_when_every_sample_fails_the_command_fails_and_says_why(run, tmp_path):
    source, out = tmp_path / "q.jsonl", tmp_path / "r.jsonl"
    source.write_text('{"prompt": "2 + 2?"}\n{"prompt": "3 + 3?"}\n')
    answers = [(400, {"error": {"message": "no such parameter"}})] * 4
    with StubServer(lambda _, number: answers[number] if number < len(answers) else reply()) as server:
        command = ("data", "rollout", source, "-o", out, "--endpoint", server.url, "--model", "m", "-k", 2)
        result = run(*command, "--json")
        assert result.exit_code == 2
        assert "all 4 samples failed, the last because: 400" in result.stderr
        assert "no such parameter" in result.stderr
        assert json.loads(result.stdout)["num_failed"] == 4
        assert report_of(run(*command, "--retry-failed", "--json"))["num_failed"] == 0


@pytest.mark.parametrize("command", ["sft", "opd", "questions"])
def test_what_is_read_is_never_what_is_written(run, tmp_path, questions, command):
    before = questions.read_bytes()
    link = tmp_path / "link.jsonl"
    link.symlink_to(questions)
    result = run("data", command, questions, "-o", link)
    assert result.exit_code == 2
    assert "is what is read" in result.stderr
    assert questions.read_bytes() == before


def test_nothing_that_may_stay_is_said(run, tmp_path):
    (tmp_path / "r.jsonl").write_text("")
    result = run("data", "sft", tmp_path / "r.jsonl", "-o", tmp_path / "sft.jsonl")
    assert result.exit_code == 0
    assert "is empty" in result.stderr
    result = run("data", "rollout", tmp_path / "r.jsonl", "-o", tmp_path / "out.jsonl", "--model", TEACHER)
    assert result.exit_code == 2
    assert "holds no question" in result.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["rollout", "q.jsonl", "-o", "r.jsonl", "--model", "m", "--template-option", "a=1"],
            "--template-option needs --endpoint",
        ),
        (
            ["rollout", "q.jsonl", "-o", "r.jsonl", "--model", "m", "--endpoint", "http://x", "--template-option", "a"],
            "NAME=JSON",
        ),
        (
            ["rollout", "q.jsonl", "-o", "r.jsonl", "--model", "m", "--endpoint", "http://x", "--regex", "a"],
            "there is no --regex",
        ),
        (
            ["rollout", "q.jsonl", "-o", "r.jsonl", "--model", "m", "--endpoint", "http://x", "--method", "regular"],
            "--method: of the engine here",
        ),
        (["rollout", "q.jsonl", "-o", "r.jsonl", "--model", "m", "--max-retries", "2"], "need --endpoint"),
        (["rollout", "q.jsonl", "-o", "r.jsonl", "--model", "m", "--endpoint", "x:80/v1"], "http://teacher:8000/v1"),
        (["rollout", "q.jsonl", "-o", ".", "--model", "m"], "is no file"),
        (["sft", "q.jsonl", "-o", "rows.parquet"], "ends in .jsonl"),
        (["rollout", "none.jsonl", "-o", "r.jsonl", "--model", "m"], "none.jsonl is neither"),
        (["rollout", "taste.jsonl", "-o", "r.jsonl", "--model", "m"], "no grader 'taste'"),
        (["questions", "tiny-world", "-o", "r.jsonl"], "say how many problems with --num"),
        (["sft", "none.jsonl", "-o", "r.jsonl"], "none.jsonl is neither"),
        (["sft", "q.jsonl", "-o", "r.jsonl"], "q.jsonl: 1 of 1 rows are no RolloutRow: line 1"),
        (["opd", "q.jsonl", "-o", "r.jsonl", "--sft-share", "2"], "sft_share must be in [0, 1]"),
    ],
)
def test_refused(run, tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    Path("q.jsonl").write_text('{"prompt": "?"}\n')
    Path("taste.jsonl").write_text('{"prompt": "?", "grader": "taste"}\n')
    result = run("data", *options)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert not Path("r").exists()
