"""`pipo opd`: from a file of prompts to an adapter; killed and resumed; what it says when it can't."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from opd_runs import losses_of, make_config, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of the tiny world of cards, which have a grader."""
    from pipo.demo.questions import card_questions

    folder = make_world(tmp_path_factory.mktemp("world"))
    rows = [{"messages": q.messages, "grader": q.grader, "metadata": q.metadata} for q in card_questions(6, seed=0)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"messages": []}]))
    return folder


@pytest.fixture
def recipe(world: Path, tmp_path: Path) -> Path:
    config = make_config(world, tmp_path / "run", run={"max_steps": 8, "save_every": 1, "keep": 1})
    path = tmp_path / "opd.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def test_prompts_become_an_adapter_that_merges(run: Any, recipe: Path, tmp_path: Path) -> None:
    result = run("opd", recipe, "run.max_steps=2", "divergence.mode=sampled", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["num_examples"], summary["metrics"]["step"]) == (6, 2)
    assert summary["metrics"]["rollout_accuracy"] == 0.0
    assert [bad["line"] for bad in summary["data"]["bad"]] == [7]
    assert "1 rows can't be used: line 7" in result.stderr
    assert "tokens a rollout  0% right" in result.stderr
    merged = run("merge", tmp_path / "run")
    assert merged.exit_code == 0, merged.output
    said = run("generate", tmp_path / "run" / "final-merged", "--prompt", "1+1?", "--max-tokens", "4", "--json")
    assert said.exit_code == 0, said.output


def test_a_killed_run_goes_on_to_the_same_losses(run: Any, recipe: Path, tmp_path: Path) -> None:
    """SIGKILL after its second report, wherever it is then: in a save, a rollout, or a backward pass."""
    done = run("opd", recipe, f"run.out={tmp_path / 'undisturbed'}")
    assert done.exit_code == 0, done.output
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "pipo", "opd", str(recipe)], stdout=log, stderr=log)
        metrics, until = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
        while not metrics.is_file() or metrics.read_text().count("\n") < 2:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.002)
        process.kill()
        process.wait()
    resumed = run("opd", recipe, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "undisturbed")


def test_errors_of_the_caller_are_one_line(run: Any, recipe: Path, tmp_path: Path) -> None:
    for arguments, said in (
        (["rollout.backend=server"], "url goes with backend: server"),
        (["run.strategy=fsdp2"], "can't run on weights that are sharded"),
        (["teacher.path=nowhere/at/all"], "nowhere/at/all"),
        (["data.max_prompt_tokens=3"], "nothing to train on"),
        (["rollout.backend=server", "rollout.url=http://127.0.0.1:1", "rollout.api=sglang"], "needs a plugin"),
    ):
        result = run("opd", recipe, f"run.out={tmp_path / 'other'}", *arguments)
        assert result.exit_code == 2, result.output
        assert said in result.stderr
        assert "Traceback" not in result.stderr
