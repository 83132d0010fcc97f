"""The gate study: a killed one goes on, every arm is measured, rules do what they say, the page follows the figures."""

import fcntl
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pipo.cli.study import app
from pipo.demo.run import CHECKPOINTS
from pipo.demo.study.measure import ALWAYS, NEVER, Player, measure, set_thresholds
from pipo.demo.study.page import Findings, render_page, render_plots
from pipo.demo.study.plan import FULL, GATES, HEADLINE, MODELS, ORACLE, OWN, PROBABILITY, QUICK, RANDOM, contrasts
from pipo.demo.study.results import figure
from pipo.demo.study.rules import right_draft
from pipo.demo.study.run import main, points_path, seed_folder, work_on_seed
from pipo.demo.world import Problem, draw_problems
from pipo.errors import ConfigError

PUBLISHED = Path(__file__).parents[2] / "docs" / "results"
PROBLEMS = draw_problems(5, 12, "test")


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, "the study ended before it could be killed"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[Path, dict[Path, int]]:
    """A miniature that was killed after two curves, and then finished; with when each file before the kill was written."""
    out = tmp_path_factory.mktemp("study") / "out"
    command = [sys.executable, "-m", "pipo", "study", "gate", "--quick", "--seeds", "1", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_for(points_path(seed_folder(out, 0), "sft", OWN), process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = [*out.glob("*/stages/*/run.json"), *out.glob("*/gates/*.safetensors"), *out.glob("*/points/*.json")]
    before = {path: path.stat().st_mtime_ns for path in done}
    main(out, 1, QUICK, Console(quiet=True))
    return out, before


def test_a_killed_study_goes_on_after_what_was_done(study) -> None:
    out, before = study
    assert len(before) > 20
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (out / "gate.md").is_file()


def test_a_seed_is_worked_on_by_one_process_alone(study, monkeypatch) -> None:
    out, _ = study
    page = (out / "gate.md").stat().st_mtime_ns
    with (seed_folder(out, 0) / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process"):
            work_on_seed(out, 0, QUICK, Console(quiet=True))
    work_on_seed(out, 0, QUICK, Console(quiet=True))  # nothing is left to do, and no page to write
    assert (out / "gate.md").stat().st_mtime_ns == page
    monkeypatch.setattr("pipo.demo.study.run.work_on_seed", lambda *_: pytest.fail("worked in spite of a wrong option"))
    found = CliRunner().invoke(app, ["gate", "--quick", "--out", str(out), "--only-seed", "0", "--page", str(out)])
    assert isinstance(found.exception, ConfigError)
    assert "--page" in str(found.exception)


def test_every_arm_is_measured_at_every_point(study) -> None:
    results = json.loads((study[0] / "gate.json").read_text())
    found = {(row["model"], row["gate"], row["point"]) for row in results["points"]}
    targets = {f"{target:g}" for target in QUICK.tokens_per_step}
    for model, gates in MODELS.items():
        for gate in gates:
            wanted = {ORACLE.name} if gate == ORACLE else {"always", *targets}
            assert {point for m, g, point in found if (m, g) == (model, gate.name)} >= wanted
        assert (model, OWN.name, "never") in found
    assert len(results["contrasts"]) == len(contrasts())
    assert {stage["name"] for stage in results["stages"]} == {stage.name for stage in QUICK.recipe.stages}


def test_a_gate_that_commits_everything_changes_nothing(study) -> None:
    folder = seed_folder(study[0], 0)
    for model, gates in MODELS.items():
        tokens = set()
        for gate in (gate for gate in gates if gate != ORACLE):
            points = {point["name"]: point for point in json.loads(points_path(folder, model, gate).read_text())}
            tokens.add((points["always"]["num_tokens"], points["always"]["num_steps"]))
        assert len(tokens) == 1


def test_a_folder_of_another_study_is_refused(study, tmp_path) -> None:
    with pytest.raises(ConfigError, match="recipe"):
        main(study[0], 1, FULL, Console(quiet=True))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no study"):
        main(tmp_path, 1, QUICK, Console(quiet=True))


# --- gates without weights ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Path:
    """A seed's folder whose SFT model is the demo's."""
    folder = tmp_path_factory.mktemp("shipped")
    (folder / "stages" / "sft").mkdir(parents=True)
    (folder / "stages" / "sft" / "model").symlink_to(CHECKPOINTS / "pipo")
    return folder


def test_what_a_right_draft_is() -> None:
    problem = Problem("Ann", 37, ("+5", "-8"))
    assert right_draft(problem, ["Play"], " +5") is True
    assert right_draft(problem, ["Play"], " x2") is False
    assert right_draft(problem, ["Play", " +5"], " 4") is True
    assert right_draft(problem, ["Play", " x2"], " 4") is None  # the prefix is wrong: nothing can be right after it
    whole = ["Play", " +5", " 4", "2", " -8", " 3"]
    assert right_draft(problem, [*whole, "4"], "") is True
    assert right_draft(problem, whole, "") is False


def test_the_oracle_commits_what_is_right_and_nothing_else(shipped) -> None:
    player = Player(shipped, "sft", ORACLE, PROBLEMS)
    rejected = 0
    for problem, output in zip(PROBLEMS, player.play(PROBLEMS, 0.5, 0, 1), strict=True):
        written: list[str] = []
        for pair in output.pairs or []:
            written.append(player.pieces.get(pair.token1, "?"))
            draft = player.pieces.get(pair.draft, "?")
            right = right_draft(problem, written, draft)
            if written[-1] != "":
                assert pair.committed == (right is not False)
                rejected += right is False
            written += [draft] if pair.committed else []
    assert rejected > 0


def test_the_random_gate_knows_nothing_and_does_not_change_its_mind(shipped) -> None:
    player = Player(shipped, "sft", RANDOM, [])
    always, half = (player.play(PROBLEMS, threshold, 0, 4) for threshold in (0.0, 0.5))
    first = [[output.pairs[0].confidence for output in outputs] for outputs in (always, half)]
    assert first[0] == first[1]
    judged = [pair for output in half for pair in output.pairs if pair is not output.pairs[-1]]
    assert all(pair.committed == (pair.confidence >= 0.5) for pair in judged)
    assert 0.4 < sum(pair.committed for pair in judged) / len(judged) < 0.6
    point = measure(Player(shipped, "sft", RANDOM, []), "always", PROBLEMS, ALWAYS, 0)
    assert point.auc is not None
    assert 0.3 < point.auc < 0.7


def test_the_probability_gate_is_the_drafts_probability(shipped) -> None:
    output = Player(shipped, "sft", PROBABILITY, []).play(PROBLEMS[:1], 0.3, 0, 1)[0]
    for pair in output.pairs[:-1]:
        assert pair.confidence == pytest.approx(math.exp(pair.logprob2))
        assert pair.committed == (pair.confidence >= 0.3)


@pytest.mark.parametrize("gate", [RANDOM, OWN], ids=lambda gate: gate.name)
def test_thresholds_come_to_the_tokens_per_step_they_are_set_for(shipped, gate) -> None:
    player = Player(shipped, "sft", gate, [])
    targets = (1.85, 1.5)
    thresholds = set_thresholds(player, draw_problems(1, 48, "train"), targets, 0)
    for target, threshold in zip(targets, thresholds, strict=True):
        outputs = player.play(PROBLEMS * 2, threshold, 1, 2)
        reached = sum(o.num_tokens for o in outputs) / sum(o.num_pairs for o in outputs)
        assert reached == pytest.approx(target, abs=0.07)


def test_never_commits_one_token_a_step(shipped) -> None:
    point = measure(Player(shipped, "sft", OWN, []), "never", PROBLEMS[:4], NEVER, 0)
    assert point.num_tokens == point.num_steps
    assert (point.num_drafts, point.auc, point.bins) == (0, None, [])


# --- figures and the page ------------------------------------------------------------------------------------


def test_a_figure_is_the_mean_over_problems_with_the_seeds_beside_it() -> None:
    one = figure([[1.0, 0.0], [0.5, 0.5]])
    assert (one.value, one.seeds) == (50.0, [50.0, 50.0])
    half = 100 * 1.959964 * (0.5 / 3) ** 0.5 / 2  # standard deviation of 1, 0, .5, .5, over four problems
    assert (one.low, one.high) == pytest.approx((50 - half, 50 + half))


def test_the_page_says_what_the_figures_say(study) -> None:
    results = json.loads((study[0] / "gate.json").read_text())
    assert render_page(results) == (study[0] / "gate.md").read_text()
    assert HEADLINE in QUICK.tokens_per_step
    row = next(
        row
        for row in results["points"]
        if (row["model"], row["gate"], row["point"]) == ("opd-draft", "own", f"{HEADLINE:g}")
    )
    row["tokens_per_step"] = 1.84
    verdicts = []
    for low, value, high in ((-0.9, 0.2, 1.3), (-1.5, -0.4, 0.7), (-1.8, -1.2, -0.6), (-4.0, -3.0, -2.0)):
        row["to_never"] = {"value": value, "low": low, "high": high, "seeds": [value]}
        verdicts.append(Findings(results).claims()[-1]["verdict"])
        assert f"[{low:+.1f}, {high:+.1f}]".replace("-", "−") in render_page(results)
    assert verdicts == ["reached", "reached on average, the interval does not exclude a miss", "open", "missed"]
    row["tokens_per_step"] = 1.79
    assert Findings(results).claims()[-1]["verdict"] == "too slow"


def test_the_published_page_is_that_of_its_figures() -> None:
    results = json.loads((PUBLISHED / "gate.json").read_text())
    assert render_page(results) == (PUBLISHED / "gate.md").read_text()
    for name, plot in render_plots(results).items():
        assert plot == (PUBLISHED / name).read_text()
    assert results["num_seeds"] == 3
    assert results["study"]["num_problems"] == FULL.num_problems


def test_plots_show_every_gate(study) -> None:
    for name, plot in render_plots(json.loads((study[0] / "gate.json").read_text())).items():
        assert (study[0] / name).read_text() == plot
        assert plot.count("<polyline") == len(GATES)
        assert "nan" not in plot
