"""`pipo eval` as somebody types it, on the demo's checkpoints."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import pipo
from pipo.cli.conditions import parse_conditions
from pipo.cli.eval_run import TASK_NAMES, known_tasks
from pipo.cli.live import duration, line, table
from pipo.errors import ConfigError
from pipo.evaluation.progress import CellProgress, Progress, Stopwatch
from pipo.evaluation.records import SampleRecord
from pipo.evaluation.settings import Condition

DEMO = Path(pipo.__file__).parent / "demo" / "checkpoints"


def samples(folder: Path) -> dict[str, list[SampleRecord]]:
    """The samples of a run, by file."""
    return {
        path.name: [SampleRecord.model_validate_json(line) for line in path.read_text().splitlines()]
        for path in sorted((folder / "samples").iterdir())
    }


def test_a_sweep_of_the_demos_model(run, tmp_path):
    """The whole way: questions, engine, gate, grader, files. The same command again only reads."""
    command = ("eval", "--model", DEMO / "pipo", "--tasks", "tiny-world", "--sweep", "threshold=0,.95,1.01")
    command += ("--limit", 6, "--samples", 2, "--out", tmp_path)
    result = run(*command)
    assert result.exit_code == 0, result.output
    [folder] = tmp_path.iterdir()
    assert folder.name.startswith("tiny-world-pipo-0-pipo-0.95-pipo-1.01-")
    found = samples(folder)
    assert [len(rows) for rows in found.values()] == [12, 12, 12]
    always, often, never = (found[f"tiny-world.pipo-{threshold}.jsonl"] for threshold in ("0", "0.95", "1.01"))
    assert sum(one.num_rejected for one in always) == 0
    assert sum(one.num_committed for one in often) > 0
    assert sum(one.num_committed for one in never) == 0
    assert any(one.pairs.judged for one in often)
    assert "PIPO τ = 0.95" in result.stdout
    assert {"results.json", "results.csv", "report.html"} <= {path.name for path in folder.iterdir()}
    before = {path: path.stat().st_mtime_ns for path in folder.glob("samples/*")}
    again = run(*command, "--json")
    assert again.exit_code == 0
    assert [cell["condition"] for cell in json.loads(again.stdout)["runs"][0]["cells"]] == [
        "pipo-0",
        "pipo-0.95",
        "pipo-1.01",
    ]
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("samples/*")}


def test_baselines_of_the_demos_regular_model(run, tmp_path):
    result = run(
        "eval", "--model", DEMO / "regular", "--tasks", "tiny-world", "--method", "regular,speculative,mtp",
        "--limit", 4, "--samples", 1, "--out", tmp_path, "--run", "mine",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = samples(tmp_path / "mine")
    assert list(found) == [f"tiny-world.{name}.jsonl" for name in ("mtp", "regular", "speculative")]
    assert "tokens/step" in result.stderr


def test_results_of_a_local_model_lie_beside_it(run, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(DEMO / "regular", model)
    result = run("eval", "-m", model, "-t", "tiny-world", "--limit", 1, "-k", 1)
    assert result.exit_code == 0, result.output
    assert [path.name.rpartition("-")[0] for path in (model / "eval").iterdir()] == ["tiny-world-regular"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--method", "regular"], "is a PIPO checkpoint"),
        (["--method", "pipo,eagle"], "a method is one of regular, speculative, mtp, pipo, got 'eagle'"),
        (["--method", "pipo,pipo"], "conditions name something twice"),
        (["--sweep", "temperature=0,1"], "--sweep takes threshold=A,B"),
        (["--sweep", "threshold=a"], "--sweep takes numbers"),
        (["--sweep", "threshold=0", "--threshold", "1"], "--sweep names all thresholds"),
        (["--tasks", "tiny-world,aime"], "there is no task 'aime'; there are"),
        (["--source", "tiny-world"], "--source takes TASK=PATH"),
        (["--source", "aime2025=x.jsonl"], "which is not among the tasks"),
        (["--samples", "0"], "num_samples must be at least 1, got 0"),
        (["--temperature", "-1"], "temperature must be ≥ 0"),
        (["--run", "../x"], "--run takes a name"),
        (["--timeout-s", "3", "--request-field", "a=1"], "--timeout-s, --request-field needs --base-url"),
        (["--base-url", "http://127.0.0.1:9/v1", "--dtype", "float32"], "--dtype: of the engine here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_not_be_is_said_before_anything_starts(run, tmp_path, options, told):
    result = run("eval", "--model", DEMO / "pipo", "--tasks", "tiny-world", "--out", tmp_path / "runs", *options)
    assert result.exit_code == 2
    assert told in result.stderr
    assert not (tmp_path / "runs").exists()


def test_methods_are_named_as_conditions():
    pipo_at = partial(Condition, "pipo")
    assert parse_conditions(None, None, None, "pipo") == (pipo_at(0.95),)
    assert parse_conditions(None, None, None, "regular") == (Condition("regular"),)
    assert parse_conditions("regular, pipo", 0.5, None, "regular") == (Condition("regular"), pipo_at(0.5))
    assert parse_conditions("pipo", None, "threshold=0,.8", "pipo") == (pipo_at(0.0), pipo_at(0.8))
    with pytest.raises(ConfigError, match="--threshold and --sweep are of the method pipo"):
        parse_conditions("regular", 0.5, None, "pipo")


def test_the_help_names_every_task():
    assert TASK_NAMES.split(", ") == list(known_tasks())


def test_ctrl_c_leaves_soon_and_the_same_command_goes_on(run, tmp_path):
    """The last word names the way on; the records are those of a run that nobody stopped."""
    command = ["eval", "--model", str(DEMO / "pipo"), "--tasks", "tiny-world", "--limit", "6", "--out", str(tmp_path)]
    command += ["--concurrency", "2", "--dtype", "float32", "--run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipo", *command, "stopped"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    path = tmp_path / "stopped" / "samples" / "tiny-world.pipo-0.95.jsonl"
    while process.poll() is None and not (path.is_file() and path.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "the same command goes on" in said
    assert "Traceback" not in said
    assert json.loads((tmp_path / "stopped" / "run.json").read_text())["status"] == "stopped"
    assert 0 < len(path.read_text().splitlines()) < 24
    for name in ("stopped", "undisturbed"):
        assert run(*command, name).exit_code == 0
    [stopped], [undisturbed] = (samples(tmp_path / name).values() for name in ("stopped", "undisturbed"))
    assert [(one.text, one.correct) for one in stopped] == [(one.text, one.correct) for one in undisturbed]


# --- what is shown meanwhile


def cell(**values) -> CellProgress:
    clock = Stopwatch(clock=iter([0.0, 20.0]).__next__)
    with clock:
        pass
    return CellProgress("aime2025", Condition("pipo", 0.5), 120, watch=clock, **values)


def test_a_line_says_how_far_a_cell_is():
    there = cell(num_before=20, num_done=40, num_tokens=8000, num_steps=5000, num_graded=50, num_right=20, num_failed=1)
    assert line(there) == (
        "aime2025, PIPO τ = 0.5: 60/120 · 40.0% right · 400 tokens/s · 1.60 tokens/step · 30 s left · 1 failed"
    )
    assert line(cell()) == "aime2025, PIPO τ = 0.5: 0/120"


def test_the_table_shows_the_cells_around_the_one_at_work():
    cells = [cell(num_done=120, num_graded=120) for _ in range(20)] + [cell() for _ in range(20)]
    assert table(Progress(cells)).row_count == 13
    assert table(Progress([cell()])).row_count == 1


def test_durations_name_the_two_units_that_matter():
    assert [duration(seconds) for seconds in (0.2, 61, 7384)] == ["0 s", "1 min 01 s", "2 h 03 min"]


def test_a_checkpoints_own_threshold_is_the_usual_one(tmp_path):
    """Breaks when an evaluation measures another gate than the one that is served."""
    from pipo import PipoForCausalLM
    from pipo.evaluation.settings import Condition
    from pipo.evaluation.subject import EngineSubject

    model = PipoForCausalLM.from_pretrained(DEMO / "pipo")
    model.set_gate(threshold=0.7, confidence_scale=2.0)
    model.save_pretrained(tmp_path / "model")
    subject = EngineSubject(str(tmp_path / "model"))
    assert subject.threshold == 0.7
    assert parse_conditions(None, None, None, "pipo", subject.threshold) == (Condition("pipo", 0.7),)
    assert subject.describe()["gate"]["confidence_scale"] == 2.0
    model.set_gate(threshold=0.7, confidence_scale=3.0)
    model.save_pretrained(tmp_path / "other")
    assert EngineSubject(str(tmp_path / "other")).describe() != subject.describe()


def test_every_engine_option_is_taken() -> None:
    """Breaks when a new option of the engine is unknown to what evaluates checkpoints: `pipo eval` would fail with a TypeError."""
    import inspect

    from pipo.cli.options import ENGINE_OPTIONS
    from pipo.evaluation.subject import EngineSubject

    taken = inspect.signature(EngineSubject).parameters
    assert {option.name for option in ENGINE_OPTIONS} - {"method"} <= taken.keys()
