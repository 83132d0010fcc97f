"""`pipo sft`: from a file of conversations to an adapter, and what it says when it can't."""

import json
import shutil

import pytest
import torch
import yaml


@pytest.fixture
def recipe(base_folder, tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{a}+{a}?"},
                {"role": "assistant", "content": f"<think>\n{a}</think>{2 * a}."},
            ]
        }
        for a in range(9)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"messages": "no"}]))
    content = {
        "model": {"path": str(base_folder), "dtype": "float32"},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_slots": 96},
        "run": {"out": str(tmp_path / "run"), "batch_size": 2, "accumulation": 2, "device": "cpu", "save_every": 2},
        "tuning": {"rank": 2},
    }
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_conversations_become_an_adapter_that_merges(run, recipe, tmp_path):
    result = run("sft", recipe, "run.epochs=2", "optimizer.lr=1e-2", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["num_examples"], summary["num_steps"], summary["metrics"]["step"]) == (9, 6, 6)
    assert [bad["line"] for bad in summary["data"]["bad"]] == [10]
    assert "1 rows can't be used: line 10" in result.stderr
    assert "parameters are trained" in result.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert f"step 6/6  loss {rows[-1]['loss']:.3f}" in result.stderr
    merged = run("merge", tmp_path / "run")
    assert merged.exit_code == 0, merged.output
    said = run("generate", tmp_path / "run" / "final-merged", "--prompt", "1+1?", "--max-tokens", "4", "--json")
    assert said.exit_code == 0, said.output


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "Stopped. The same command with --resume goes on from the last checkpoint"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried.\nMore"),
            2,
            "CUDA out of memory. Tried. Lower run.batch_size",
        ),
    ],
)
def test_what_stops_a_run_is_one_line(run, recipe, monkeypatch, error, status, said):
    def stop(*_, **__):
        raise error

    monkeypatch.setattr("pipo.training.sft.run_sft", stop)
    result = run("sft", recipe)
    assert result.exit_code == status
    assert said in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_what_is_said_for_people_names_the_next_command(run, recipe, tmp_path):
    result = run("sft", recipe, "run.max_steps=1")
    assert result.exit_code == 0, result.output
    assert f"Next: pipo merge {tmp_path / 'run' / 'final'}" in result.stdout
    again = run("sft", recipe, "run.max_steps=1")
    assert again.exit_code == 2
    assert "is not empty; go on with the run in it by --resume" in again.stderr
    shutil.rmtree(tmp_path / "run" / "final")
    (tmp_path / "run" / "run.json").write_text(
        (tmp_path / "run" / "run.json").read_text().replace("finished", "running")
    )
    resumed = run("sft", recipe, "run.max_steps=1", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "Going on after step 1 of 1" in resumed.stderr
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()


def test_a_tracker_that_is_not_installed_is_named(run, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("pipo.training.arguments.find_spec", lambda name: None)
    result = run("sft", recipe, "run.report_to=[trackio]")
    assert result.exit_code == 2
    assert "trackio is not installed: pip install trackio" in result.stderr
    assert not (tmp_path / "run").exists()


def test_errors_of_the_caller_are_one_line(run, recipe, tmp_path):
    for arguments, said in (
        (["run.batches=2"], "run.batches is no setting"),
        (["data.max_slots=7"], "must be even, got 7"),
        (["tuning.targets=[lm_head]"], "lm_head can't be trained"),
        (["--plan", "--resume"], "there is nothing to --resume"),
    ):
        result = run("sft", recipe, *arguments)
        assert result.exit_code == 2
        assert said in result.stderr
        assert result.stderr.startswith("pipo: ")
        assert len(result.stderr.splitlines()) == 1
    result = run("sft", recipe, "run.max_steps=1")  # nothing was trained before: the folder is as good as empty
    assert result.exit_code == 0, result.output


def test_a_plan_trains_nothing(run, recipe, tmp_path):
    result = run("sft", recipe, "--plan", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["trained"]["num_trained"] > 0
    assert not (tmp_path / "run").exists()
