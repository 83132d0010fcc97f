"""`pipo demo` on the shipped checkpoints, as small as it gets. What it measures is tested in tests/demo."""

import json

import pytest

from pipo.demo.run import CHECKPOINTS


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def test_stdout_is_the_rows_and_nothing_else(run, tmp_path):
    result = run("demo", "--out", tmp_path, "--num-problems", "1", "--seed", "3", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout, parse_constant=refuse_constant)
    assert rows == json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse_constant)
    assert {"regular", "mtp", "speculative", "pipo"} <= {row["method"] for row in rows}
    keys = "method threshold avg_at_4 pass_at_4 tokens_per_step commit_rate ttft_s tpot_s num_problems"
    assert all(set(keys.split()) <= set(row) for row in rows)
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_a_model_of_ones_own(run, tmp_path):
    own = CHECKPOINTS / "pipo"
    result = run("demo", "--out", tmp_path, "--num-problems", "1", "--pipo", own)
    assert result.exit_code == 0, result.output
    assert str(own) in result.stdout
    assert "Measured when these checkpoints were trained" not in result.stdout  # the shipped controls say nothing of it
    assert str(own) in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--resume"], "--resume goes with --train"),
        (["--train", "--json"], "go without --train"),
        (["--checkpoints", "/nowhere"], "/nowhere"),
        (["--pipo", "/nowhere"], "/nowhere"),
    ],
)
def test_refused(run, tmp_path, options, says):
    result = run("demo", "--out", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert says in result.stderr
    assert not (tmp_path / "out").exists()
