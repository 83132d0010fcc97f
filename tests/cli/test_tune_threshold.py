"""`pipo tune-threshold` as somebody types it, on the demo's checkpoint."""

import json
import shutil
from pathlib import Path

import pytest

import pipo
from pipo.cli.threshold_table import describe_choice, describe_failure
from pipo.demo.questions import card_questions
from pipo.engine.loading import threshold_of
from pipo.evaluation.statistics import Estimate
from pipo.evaluation.tuning import Point, Target
from pipo.model.adapter import ADDITIONAL_CONFIG
from pipo.model.save import save_threshold

DEMO = Path(pipo.__file__).parent / "demo" / "checkpoints"
SHORT = ("--max-tokens", 40, "--temperature", 1)


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the demo's checkpoint, which may be written to."""
    return Path(shutil.copytree(DEMO / "papers-gate", tmp_path / "model"))


@pytest.fixture
def prompts(tmp_path) -> Path:
    """Questions of the demo, in both forms that rows of prompts have."""
    questions = [question.messages for question in card_questions(8, 3, "test")]
    rows = [{"messages": one} for one in questions[1:]] + [{"prompt": questions[0][0]["content"], "source": "mine"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(folder):
    return {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_loss_of_accuracy_on_a_task(run, model):
    """Questions, engine, grades, choice; then the same command saves what it measured before."""
    command = ("tune-threshold", model, "--target", "accuracy-drop=100", "--tasks", "tiny-world")
    command += ("--limit", 4, "-k", 1, "--thresholds", ".9,0")
    before = contents(model)
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "against never" in result.stdout
    assert "← chosen" in result.stdout
    assert "The same command with --save" in result.stdout
    assert contents(model) == before
    [folder] = (model / "tune").iterdir()
    found = json.loads((folder / "curve.json").read_text())
    assert [one["threshold"] for one in found["curve"]] == [0.0, 0.9, 1.01]
    assert found["curve"][0]["difference"]["num_questions"] == 4
    fastest = max(found["curve"], key=lambda one: one["tokens_per_step"])
    assert found["threshold"] == fastest["threshold"] <= 0.9
    assert found["certain"] is True
    samples = {path: path.stat().st_mtime_ns for path in folder.glob("samples/*")}
    again = run(*command, "--save", "--json")
    assert again.exit_code == 0, again.output
    told = json.loads(again.stdout)
    assert told["curve"] == found["curve"]
    assert told["saved"] == str(model / "config.json")
    assert threshold_of(model) == found["threshold"]
    assert samples == {path: path.stat().st_mtime_ns for path in folder.glob("samples/*")}
    assert run(*command).exit_code == 0  # another τ in the checkpoint is no other checkpoint
    assert list((model / "tune").iterdir()) == [folder]


def test_a_speed_on_prompts(run, model, prompts, tmp_path):
    command = ("tune-threshold", model, "--target", "tokens-per-step=1.5", "--prompts", prompts, "-k", 1)
    command += (*SHORT, "--out", tmp_path / "runs")
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "avg@k" not in result.stdout
    [folder] = (tmp_path / "runs").iterdir()
    found = json.loads((folder / "curve.json").read_text())
    assert found["measured_on"] == {"prompts": str(prompts), "num_prompts": 8, "num_samples": 1}
    [chosen] = [one for one in found["curve"] if one["threshold"] == found["threshold"]]
    assert chosen["tokens_per_step"] >= 1.5
    assert not [
        one for one in found["curve"] if one["threshold"] > chosen["threshold"] and one["tokens_per_step"] >= 1.5
    ]
    assert "τ = 0:" in result.stderr
    saved = run(*command, "--save")
    assert saved.exit_code == 0, saved.output
    assert "τ = 0:" not in saved.stderr  # nothing was measured anew
    assert threshold_of(model) == found["threshold"]


def test_what_is_out_of_reach_is_said_with_what_was_reached(run, model, prompts):
    command = ("tune-threshold", model, "--target", "commit-rate=1", "--prompts", prompts, "-k", 1, *SHORT, "--save")
    before = contents(model)
    result = run(*command, "--json")
    assert result.exit_code == 2
    assert "no threshold reaches commit-rate=1; the most is τ = 0: 1." in result.stderr
    assert json.loads(result.stdout)["threshold"] is None
    assert contents(model) == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--target", "speed=1"], "a target is one of accuracy-drop=X, tokens-per-step=X, commit-rate=X"),
        (["--target", "accuracy-drop=1"], "either --tasks, or --prompts"),
        (["--target", "accuracy-drop=1", "--prompts", "{prompts}"], "accuracy-drop needs questions"),
        (["--target", "commit-rate=.5", "--prompts", "{prompts}", "--confident"], "--confident is of accuracy-drop"),
        (["--target", "commit-rate=.5", "--prompts", "{prompts}", "--thresholds", "0"], "--thresholds: of --tasks"),
        (["--target", "commit-rate=.5", "--tasks", "tiny-world", "--num-prompts", "2"], "--num-prompts: of --prompts"),
        (["--target", "commit-rate=.5", "--tasks", "tiny-world", "--thresholds", "0,2"], "from 0 to 1 (never"),
        (["--target", "commit-rate=.5", "--tasks", "tiny-world", "--thresholds", "a"], "--thresholds takes numbers"),
        (["--target", "commit-rate=.5", "--tasks", "world"], "there is no task 'world'"),
        (["--target", "commit-rate=.5", "--prompts", "{empty}"], "has no prompt"),
        (["--target", "commit-rate=.5", "--prompts", "{answered}"], "line 1: messages: the last message is the assist"),
        (["--target", "commit-rate=.5", "--prompts", "{long}"], "prompt 2 can't be answered: this model's maximum"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_not_be_is_said_before_anything_is_measured(run, tmp_path, prompts, options, told):
    files = {
        "empty": "",
        "answered": json.dumps({"messages": [{"role": "user", "content": "4"}, {"role": "assistant", "content": "5"}]}),
        "long": json.dumps({"prompt": "4"}) + "\n" + json.dumps({"prompt": "4 " * 2000}),
    }
    for name, text in files.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    paths = {**{name: tmp_path / f"{name}.jsonl" for name in files}, "prompts": prompts}
    asked = [option.format(**paths) for option in options]
    result = run("tune-threshold", DEMO / "pipo", "--out", tmp_path / "runs", *asked)
    assert result.exit_code == 2
    assert told in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_regular_checkpoint_has_no_gate(run, prompts):
    result = run("tune-threshold", DEMO / "regular", "--target", "commit-rate=.5", "--prompts", prompts)
    assert result.exit_code == 2
    assert "is a regular checkpoint, which has no gate" in result.stderr


def test_too_few_questions_are_said_to_be_too_few():
    def at(low):
        return Point(0.8, 1.84, 0.84, None, Estimate(-0.5, 1.0, low, 2.0, 30))

    target = Target("accuracy-drop", 1.0)
    assert "30 questions are too few to tell that it loses at most 1" in describe_choice(at(-3.0), target)
    assert "too few" not in describe_choice(at(-0.9), target)
    told = describe_failure([at(-3.0)], target, confident=True)
    assert "with --confident; the least loss is -0.5 [-3.0, +2.0] points at τ = 0.8" in told


def test_saving_changes_the_threshold_and_nothing_else(model, tmp_path):
    """In a whole checkpoint and its card; in an adapter's own file. Breaks when a load no longer finds it, or a setting is lost."""
    before = json.loads((model / "config.json").read_text())
    card = model / "README.md"
    card.write_text("- gate: sees both hidden states; confidence as the head gives it; τ 0.95 by default\n- mine\n")
    assert save_threshold(model, 0.8) == model / "config.json"
    assert json.loads((model / "config.json").read_text()) == {**before, "threshold": 0.8}
    assert card.read_text().endswith("τ 0.8 by default\n- mine\n")
    assert threshold_of(model) == 0.8
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / ADDITIONAL_CONFIG).write_text('{"compressor_type": "mlp", "confidence_features": "draft"}')
    save_threshold(adapter, 0.7)
    assert json.loads((adapter / ADDITIONAL_CONFIG).read_text()) == {
        "compressor_type": "mlp",
        "confidence_features": "draft",
        "threshold": 0.7,
    }
    assert threshold_of(adapter) == 0.7
