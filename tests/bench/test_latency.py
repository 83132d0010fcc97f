"""`pipo bench latency`: complete rows, the commit rate that was asked for, the same weights for every method."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pipo.bench import latency
from pipo.bench.cost import Machine
from pipo.bench.grid import Point, Row, gain, read_results
from pipo.bench.latency import Effort, bench_latency, best_of, time_batch
from pipo.bench.steering import GivenShare
from pipo.bench.subjects import Setting, Subject, open_subjects
from pipo.bench.weights import BLOCK, random_causal_lm
from pipo.cli.main import app
from pipo.errors import ConfigError
from pipo.model.shapes import shape_config

MACHINE = Machine("a slow one", bytes_per_s=1e9, flops_per_s=1e10, memory_bytes=1e10)
SETTING = Setting(shape="tiny", dtype="float32", methods=("regular", "speculative", "pipo"), commit=0.5)


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring a machine takes seconds; `test_machine.py` does it."""
    speeds = iter([MACHINE, replace(MACHINE, bytes_per_s=2e9, flops_per_s=5e9)] * 9)
    monkeypatch.setattr(latency, "measure_machine", lambda device, dtype: next(speeds))


@pytest.fixture(scope="module")
def subjects() -> list[Subject]:
    return open_subjects(replace(SETTING, methods=("regular", "mtp", "speculative", "pipo")), max_num_seqs=3)


def test_all_methods_run_on_the_same_weights(subjects: list[Subject]) -> None:
    """Breaks when a method gets a copy, whose values could differ, or shares modules, which one method's kernels could replace."""
    weights = [subject.llm.model.model.layers[0].self_attn.q_proj.weight for subject in subjects]
    assert len({weight.data_ptr() for weight in weights}) == 1
    assert len({id(subject.llm.model.model) for subject in subjects}) == len(subjects)
    heads = {subject.llm.model.lm_head.weight.data_ptr() for subject in subjects}
    assert heads == {subjects[0].llm.model.model.embed_tokens.weight.data_ptr()}  # this shape ties them


@pytest.mark.parametrize("batch", [1, 3])
def test_the_given_share_of_drafts_stands(subjects: list[Subject], batch: int) -> None:
    """Breaks when the engine does not ask what the benchmark steers: random weights would keep none."""
    per_step = {s.method: time_batch(s, Point(batch, 5), num_steps=10).tokens_per_step for s in subjects}
    assert per_step["regular"] == 1.0
    assert per_step["mtp"] == 2.0
    assert per_step["speculative"] == pytest.approx(1.5, abs=0.1)
    assert per_step["pipo"] == pytest.approx(1.5, abs=0.1)
    assert not any(subject.llm.engine.has_work or subject.llm.engine.runner.cache.num_rows for subject in subjects)


@pytest.mark.parametrize(("commit", "expected"), [(0.0, 1.0), (1.0, 2.0)])
def test_never_and_always(commit: float, expected: float) -> None:
    [subject] = open_subjects(Setting(shape="tiny", dtype="float32", methods=("pipo",), commit=commit), max_num_seqs=1)
    assert time_batch(subject, Point(1, 4), num_steps=4).tokens_per_step == expected


def test_a_share_is_exact_and_rows_are_independent() -> None:
    share = GivenShare(0.3, torch.device("cpu"))
    calls = torch.stack([share.draw(500) for _ in range(100)])
    assert set(calls.sum(0).tolist()) <= {29, 30, 31}
    assert calls.double().mean(1).sub(0.3).abs().max() < 0.1


def test_rows_are_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a figure that is promised is missing, or a floor is not of what the memory gave right after the batch."""
    monkeypatch.setattr("pipo.bench.latency.ReadingRate", lambda weights: SimpleNamespace(measure=lambda: 3e9))
    seen = []
    points = [Point(1, 4), Point(2, 9)]
    results = bench_latency(
        SETTING, points, Effort(4, 2), save=lambda r: seen.append(len(r.rows)), report=lambda n: None
    )
    assert seen == [3, 6, 6]
    assert results.complete
    assert [(row.method, row.point) for row in results.rows] == [(m, p) for p in points for m in SETTING.methods or ()]
    for row in results.rows:
        figures = (row.ttft_s, row.tpot_s, row.tokens_per_s, row.floor_s, row.ceiling, row.spread, row.ttft_floor_s)
        assert all(isinstance(figure, float) and figure >= 0 for figure in figures)
        assert len(row.tpot_rounds_s) == len(row.ttft_rounds_s) == 2
    regular, speculative, pipo = results.rows[:3]
    assert (regular.ceiling, regular.commit) == (1.0, None)
    assert 1 < (pipo.ceiling or 0) < 2
    assert speculative.commit == pytest.approx(0.5, abs=0.25)
    best = best_of(MACHINE, replace(MACHINE, bytes_per_s=2e9, flops_per_s=5e9))
    assert (best.bytes_per_s, best.flops_per_s) == (2e9, 1e10)
    weights = sum(
        p.numel() for p in random_causal_lm(shape_config("tiny"), torch.float32, torch.device("cpu")).parameters()
    )
    assert regular.floor_s == pytest.approx(4 * weights / 3e9, rel=0.1)
    assert {row.bytes_per_s for row in results.rows} == {3e9}


def test_gains_are_those_of_rounds() -> None:
    """A machine that is slow for one round is slow for both: a ratio of medians would show its mood."""
    slow, fast = (
        Row.from_rounds("regular", Point(1, 4), [1.0] * 3, times) for times in ([1.0, 6.0, 1.2], [0.5, 3.0, 0.6])
    )
    assert gain(fast, slow) == 2.0
    assert gain(fast, replace(slow, tpot_rounds_s=())) is None


def test_a_gate_that_is_not_asked_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipo.bench.subjects.steer_gate", lambda *args: 0.0)
    with pytest.raises(ConfigError, match=r"share of 0\.25 of its drafts, and kept 1\.000"):
        bench_latency(replace(SETTING, methods=("pipo",), commit=0.25), [Point(1, 4)], Effort(8, 1))


def test_random_weights_have_their_dtype_and_no_equal_rows() -> None:
    model = random_causal_lm(shape_config("tiny-wide"), torch.bfloat16, torch.device("cpu"))
    again = random_causal_lm(shape_config("tiny-wide"), torch.bfloat16, torch.device("cpu"))
    weight = model.lm_head.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert weight.numel() > 2 * BLOCK
    assert len(weight[:, :8].unique(dim=0)) == len(weight)
    assert weight.float().std() == pytest.approx(0.02, rel=0.01)
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert (model.model.norm.weight == 1).all()


def test_a_batch_that_memory_does_not_hold_is_a_row_with_its_reason() -> None:
    setting = replace(SETTING, methods=("regular", "pipo"), engine={"cache_budget_bytes": 400_000})
    rows = bench_latency(setting, [Point(1, 8), Point(8, 8)], Effort(2, 1)).rows
    assert [row.error is None for row in rows] == [True, True, False, False]
    assert "do not fit into 0.00 GB" in (rows[2].error or "")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"shape": None}, "name a shape"),
        ({"shape": "huge"}, "there is no shape 'huge'"),
        ({"methods": ("fast",)}, "methods must be some of regular, mtp, speculative, pipo, got 'fast'"),
        ({"commit": 1.5}, "commit is a share of drafts, from 0 to 1, got 1.5"),
        ({"threshold": 0.5}, "give one of them"),
        ({"device": "cuda"}, "torch finds no GPU"),
    ],
)
def test_settings_that_can_t_be_are_refused(more: dict[str, Any], message: str) -> None:
    if "device" in more and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=message):
        replace(SETTING, **more)


def test_a_context_beyond_the_model_s_is_refused() -> None:
    """The shape holds 512 tokens of a regular model and twice as many of PIPO's."""
    with pytest.raises(ConfigError, match="take 612 tokens of regular, which has room for 512"):
        bench_latency(replace(SETTING, methods=("pipo", "regular")), [Point(1, 600)], Effort(9, 1))


def test_the_command(tmp_path: Path) -> None:
    rows, page = tmp_path / "rows.json", tmp_path / "page.html"
    options = [
        "bench",
        "latency",
        "--shape",
        "tiny",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--batch",
        "1,2",
        "--context",
        "4,8",
    ]
    options += ["--methods", "regular,pipo", "--commit", "1.0", "--steps", "2", "--rounds", "1"]
    shown = CliRunner().invoke(app, [*options, "--json", str(rows), "--report", str(page)])
    assert shown.exit_code == 0, shown.output
    assert "of the limit" in shown.stdout
    results = read_results(rows, "latency", Row)
    assert len(results.rows) == 8
    assert {row.commit for row in results.rows if row.method == "pipo"} == {1.0}
    assert json.loads(rows.read_text())["machine_after"]["bytes_per_s"] == 2e9
    html = page.read_text()
    assert (
        html.count("<svg") == 8
    )  # TPOT and tokens/s by batch, for each context; TPOT and TTFT by context, for each batch
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    assert "stroke-dasharray" in html


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "--batch takes whole numbers from 1 on"),
        (["--context", "many"], "--context takes whole numbers"),
        (["--methods", "quick"], "methods must be some of"),
        (["--model", "somewhere", "--shape", "tiny"], "give one of them"),
        (["--json", "missing-folder/rows.json"], "there is no folder"),
    ],
)
def test_bad_input_is_told_in_a_line(options: list[str], message: str) -> None:
    shown = CliRunner().invoke(app, ["bench", "latency", *options])
    assert shown.exit_code == 2
    assert message in shown.output


def test_ctrl_c_leaves_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, real, calls = tmp_path / "rows.json", latency.time_batch, 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(latency, "time_batch", interrupted)
    options = [
        "--shape",
        "tiny",
        "--dtype",
        "float32",
        "--batch",
        "1,2",
        "--context",
        "4",
        "--rounds",
        "1",
        "--steps",
        "1",
    ]
    shown = CliRunner().invoke(app, ["bench", "latency", *options, "--json", str(rows)])
    assert shown.exit_code == 130
    assert "cut short" in shown.stdout
    found = read_results(rows, "latency", Row)
    assert (len(found.rows), found.complete) == (2, False)
