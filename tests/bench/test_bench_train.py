"""The estimate of memory against what a step really takes, and the benchmark's report."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from pipo.bench import train
from pipo.bench.losses import bench_losses
from pipo.bench.train import TrainBench, bench_train, estimate_of, measure_memory
from pipo.bench.train_step import Step
from pipo.cli.main import app
from pipo.errors import ConfigError, TrainingError
from pipo.losses import chunked

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")


@needs_proc
@pytest.mark.parametrize(
    "bench",
    [
        TrainBench("tiny-wide", slots=1024, dtype="bfloat16"),
        TrainBench("tiny-hybrid", slots=1024, batch=2),
        TrainBench("tiny-wide", stage="opd", slots=512, teacher_shape="tiny-hybrid"),
    ],
    ids=["sft-bfloat16", "sft-hybrid", "opd"],
)
def test_the_estimate_is_within_15_percent_of_the_measured_peak(bench: TrainBench) -> None:
    """Breaks when a component is forgotten, counted twice, or held longer than the estimate thinks."""
    measured = measure_memory(bench)
    estimate = estimate_of(bench)
    assert 0 < measured.resting_bytes < measured.peak_bytes
    assert estimate.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.15)


@pytest.mark.parametrize("shape", ["tiny", "tiny-hybrid"])
def test_plain_steps_train_lora_on_the_regular_model(shape: str) -> None:
    """Breaks when the comparison trains nothing, or more than the LoRA that PIPO's backbone has."""
    plain, stage = (
        Step(TrainBench(shape, slots=8, rank=2), "plain_half"),
        Step(TrainBench(shape, slots=8, rank=2), "stage"),
    )
    plain.run()
    assert plain.ids_BT.shape == (1, 4)
    backbone = [p for name, p in stage.model.named_parameters() if ".lora_" in name and name.startswith("model.")]
    assert [p.shape for p in plain.parameters] == [p.shape for p in backbone]


def test_the_losses_take_as_much_for_more_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when logits of all positions exist at once. Beyond a chunk, only a few numbers of each position are kept."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 2**23)
    for mode in (None, "topk"):
        few, many = bench_losses("tiny-wide", [64, 512], mode)
        assert many.peak_bytes - few.peak_bytes < (512 - 64) * 100
        assert many.peak_bytes < many.logits_bytes / 2


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, bool]]:
    """Steps that take no time; what was asked for."""
    asked: list[tuple[str, int, bool]] = []

    def measure(bench: TrainBench, work: str, num_steps: int, *, memory: bool) -> dict[str, Any]:
        asked.append((work, num_steps, memory))
        tokens = bench.batch * (bench.slots // 2 if work == "plain_half" else bench.slots)
        second = {"stage": 0.5, "plain": 0.4, "plain_half": 0.25}[work]
        seconds = [99.0] if memory else [second * (1 + i) for i in range(num_steps)]
        return {"seconds": seconds, "peak_bytes": 40_000_000, "resting_bytes": 20_000_000, "num_tokens": tokens}

    monkeypatch.setattr(train, "_measure", measure)
    return asked


def test_the_report(figures: list[tuple[str, int, bool]]) -> None:
    """Kinds of steps take turns, and the process that measures memory tells no time."""
    report = bench_train(TrainBench("tiny", slots=64, batch=2), num_steps=3, rounds=2)
    turn = ["stage", "plain", "plain_half"]
    assert figures == [(w, 1, True) for w in turn] + 2 * [(w, 3, False) for w in turn]
    works = report.works
    assert [works[w].num_tokens for w in report.works] == [128, 128, 64]
    assert (works["stage"].median_s, works["stage"].tokens_per_s) == (1.0, 128)
    assert (report.time_against("plain"), report.time_against("plain_half")) == (1.25, 2.0)
    assert report.estimate_error == report.estimate.peak_bytes / 40_000_000 - 1


def test_the_command(figures: list[tuple[str, int, bool]]) -> None:
    options = ["bench", "train", "--shape", "tiny", "--slots", "64", "--dtype", "float32"]
    shown = CliRunner().invoke(app, options)
    assert shown.exit_code == 0, shown.output
    assert "2.00×" in shown.stdout
    assert "estimated" in shown.stdout
    row = json.loads(CliRunner().invoke(app, [*options, "--stage", "opd", "--json"]).stdout)
    assert row["works"]["plain"]["fastest_s"] == 0.4
    assert row["bench"]["stage"] == "opd"
    assert row["estimate"]["components"]["teacher weights"] > 0
    assert "rollout" not in row["estimate"]["phases"]
    assert "processor" in row["machine"]
    losses = CliRunner().invoke(app, ["bench", "losses", "--shape", "tiny", "--positions", "8", "--json"])
    assert json.loads(losses.stdout)[0]["num_positions"] == 8


def test_sizes_that_can_t_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="even number of at least 4, got 7"):
        TrainBench("tiny", slots=7)
    with pytest.raises(ConfigError, match="there is no shape 'huge'"):
        TrainBench("huge")
    for opds in ({"teacher_shape": "tiny"}, {"mode": "full"}):  # they would be read and change nothing
        with pytest.raises(ConfigError, match="choose stage opd"):
            TrainBench("tiny", **opds)


def test_a_step_that_dies_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a step that ran out of memory counts as one that took none."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(TrainingError, match="the step 'stage' of shape tiny with 64 slots failed: exit status 1"):
        measure_memory(TrainBench("tiny", slots=64))
