"""The whole road, by the commands that a reader would type, in the tiny world: questions → a teacher's answers → rows → SFT → merge →
on-policy distillation → merge → text and the demo's table. A few steps of each: what is learned is for `recipes/tiny-*.yaml` to show."""

import json
import math
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import pipo.demo
from pipo.cli.main import app

RECIPES = Path(__file__).parents[2] / "recipes"
CHECKPOINTS = Path(pipo.demo.__file__).parent / "checkpoints"
NUM_QUESTIONS, SAMPLES, SFT_STEPS, OPD_STEPS = 20, 2, 4, 2
COMMON = ["run.device=cpu", "run.log_every=1", "run.save_every=2", "tuning.method=lora", "tuning.rank=4"]


def pipo_command(*arguments):
    """The command's JSON, where it ends well."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """What each command said, by its name, and the folder that they worked in."""
    folder = tmp_path_factory.mktemp("road")
    said = {"folder": folder}
    questions, rollouts = folder / "questions.jsonl", folder / "rollouts.jsonl"
    said["questions"] = pipo_command(
        "data", "questions", "tiny-world", "--num", NUM_QUESTIONS, "--out", questions, "--json"
    )
    teacher = ["--model", CHECKPOINTS / "teacher", "--method", "regular", "--device", "cpu", "--max-tokens", 64]
    said["rollout"] = pipo_command("data", "rollout", questions, *teacher, "-k", SAMPLES, "--out", rollouts, "--json")
    for kind in ("sft", "opd"):
        rows = folder / f"{kind}.jsonl"
        said[f"data {kind}"] = pipo_command("data", kind, rollouts, "--sft-share", 0.6, "--out", rows, "--json")
    sft, opd = folder / "sft", folder / "opd"
    said["sft"] = pipo_command(
        *("sft", RECIPES / "tiny-sft.yaml", "--json", f"run.out={sft}", f"data.train={folder / 'sft.jsonl'}", *COMMON),
        *(f"model.path={CHECKPOINTS / 'regular'}", f"run.max_steps={SFT_STEPS}", "run.batch_size=8"),
    )
    said["merge sft"] = pipo_command("merge", sft, "--out", folder / "student", "--json")
    said["opd"] = pipo_command(
        *("opd", RECIPES / "tiny-opd.yaml", "--json", f"run.out={opd}", f"data.train={folder / 'opd.jsonl'}", *COMMON),
        *(f"model.path={folder / 'student'}", f"teacher.path={CHECKPOINTS / 'teacher'}"),
        *(f"run.max_steps={OPD_STEPS}", "run.batch_size=4", "rollout.max_slots=64"),
    )
    said["merge opd"] = pipo_command("merge", opd, "--out", folder / "distilled", "--json")
    return said


def test_every_question_becomes_a_row_or_is_counted(road):
    """Breaks when something is lost between the teacher's answers and the rows."""
    assert road["questions"]["num_questions"] == NUM_QUESTIONS
    assert road["rollout"]["num_samples"] == road["rollout"]["num_graded"] == NUM_QUESTIONS * SAMPLES
    assert road["rollout"]["num_right"] > 0
    for kind, candidates in (("sft", NUM_QUESTIONS * SAMPLES), ("opd", NUM_QUESTIONS)):
        report = road[f"data {kind}"]
        assert report["num_candidates"] == candidates
        assert report["num_kept"] + sum(report["dropped"].values()) == candidates
        lines = (road["folder"] / f"{kind}.jsonl").read_text().splitlines()
        assert len(lines) == report["num_kept"] > 0


@pytest.mark.parametrize(("kind", "steps"), [("sft", SFT_STEPS), ("opd", OPD_STEPS)])
def test_a_run_leaves_what_it_should(road, kind, steps):
    run = road["folder"] / kind
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert all(math.isfinite(row[name]) for row in rows for name in ("loss", "backbone_loss", "mtp_loss", "grad_norm"))
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert (run / "checkpoints" / f"checkpoint-{steps}").is_dir()
    assert road[kind]["num_steps"] == steps


def test_sft_learns(road):
    rows = metrics(road["folder"] / "sft")
    assert rows[2]["loss"] + rows[3]["loss"] < rows[0]["loss"] + rows[1]["loss"]


def test_rollouts_of_the_student_are_graded(road):
    """Breaks when rows lose what their answers are checked by on the way to OPD."""
    assert all(0 <= row["rollout_accuracy"] <= 1 for row in metrics(road["folder"] / "opd"))


def test_adapters_know_what_they_were_trained_on(road):
    """Breaks when the second adapter is put on the regular model that the first one started from."""
    assert Path(road["merge sft"]["base"]).resolve() == (CHECKPOINTS / "regular").resolve()
    assert Path(road["merge opd"]["base"]).resolve() == (road["folder"] / "student").resolve()
    assert road["merge sft"]["base_checked"]
    assert road["merge opd"]["base_checked"]


def test_the_result_writes_and_stands_in_the_demos_table(road, tmp_path):
    distilled = road["folder"] / "distilled"
    asked = ["--chat", "--prompt", "Ann is on 37. Cards: +5 -8 +12 x3 +4.", "--max-tokens", 24, "--threshold", 0]
    (written,) = pipo_command("generate", distilled, *asked, "--ignore-eos", "--json")
    assert written["num_tokens"] == 24
    assert written["num_pairs"] == 12
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(CHECKPOINTS, checkpoints, ignore=shutil.ignore_patterns("pipo"))
    shutil.copytree(distilled, checkpoints / "pipo")
    table = pipo_command(
        "demo", "--out", tmp_path / "demo", "--checkpoints", checkpoints, "--num-problems", 1, "--json"
    )
    assert {"regular", "pipo"} <= {row["method"] for row in table}
