"""The whole demo in miniature: every stage with the real engine, the checkpoints, the table, rows and report."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from miniature import MINIATURE
from pipo.demo import run
from pipo.demo.recipe import Recipe, is_done
from pipo.demo.ship import ship
from pipo.demo.train import train
from pipo.errors import CheckpointError, ConfigError

KEYS = {
    "method",
    "threshold",
    "avg_at_4",
    "pass_at_4",
    "tokens_per_step",
    "commit_rate",
    "ttft_s",
    "tpot_s",
    "num_problems",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("training")
    recipe: Recipe = replace(MINIATURE, base_steps=4)
    train(recipe, out, resume=False, console=Console(quiet=True))
    assert all(is_done(out, stage.name) for stage in recipe.stages)
    ship(recipe, out, out / "checkpoints", lambda _: None, num_problems=3)
    return out


def test_the_demo_runs_on_what_was_trained(trained: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=120, quiet=True)
    run.main(tmp_path, 3, 2, False, console, trained / "checkpoints")
    rows = json.loads((tmp_path / "results.json").read_text())
    assert {row["method"] for row in rows} == {"regular", "mtp", "speculative", "pipo", "papers-gate", "teacher"}
    for row in rows:
        assert set(row) >= KEYS
        assert row["num_problems"] == 2
        assert 0 <= row["avg_at_4"] <= row["pass_at_4"] <= 100
        assert row["tokens_per_step"] == pytest.approx(1 + row["commit_rate"], abs=1e-3) or row["method"] != "pipo"
        assert all(row[key] > 0 and math.isfinite(row[key]) for key in ("ttft_s", "tpot_s"))
        assert (row["threshold"] is not None) == (row["method"] in {"pipo", "papers-gate"})
    assert len({row["threshold"] for row in rows if row["method"] == "pipo"}) >= 4
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "PIPO SFT + OPD" in page
    for name, stages in {"pipo": ["base", "sft", "opd", "gate"], "papers-gate": ["base", "sft", "opd"]}.items():
        record = json.loads((trained / "checkpoints" / name / "run.json").read_text())
        assert [entry["stage"]["name"] for entry in record["stages"]] == stages


def test_the_two_gates_sit_on_one_model(trained: Path) -> None:
    ours, papers = (load_file(trained / "checkpoints" / name / "model.safetensors") for name in ("pipo", "papers-gate"))
    assert set(ours) - set(papers) == {"confidence_head.draft.weight", "confidence_head.draft.bias"}
    changed = {name for name in papers if not torch.equal(ours[name], papers[name])}
    assert changed
    assert all(name.startswith("confidence_head.") for name in changed)
    shipped = [load_file(run.CHECKPOINTS / name / "model.safetensors") for name in ("pipo", "papers-gate")]
    assert all(torch.equal(shipped[0][n], t) for n, t in shipped[1].items() if not n.startswith("confidence_head."))


def test_json_is_all_that_is_printed(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.main(tmp_path, 0, 1, True, Console(stderr=True, quiet=True), trained / "checkpoints")
    printed = capsys.readouterr().out
    assert json.loads(printed) == json.loads((tmp_path / "results.json").read_text())


def test_wrong_arguments_are_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_problems"):
        run.main(tmp_path, 0, 0, False, Console(quiet=True), trained / "checkpoints")
    with pytest.raises(CheckpointError, match="--train"):
        run.main(tmp_path, 0, 1, False, Console(quiet=True), tmp_path)
