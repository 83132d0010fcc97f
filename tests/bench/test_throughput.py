"""`pipo bench throughput` and `pipo bench memory`: every request is served, and figures are of what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipo.bench import memory
from pipo.bench.grid import Point, read_results
from pipo.bench.memory import MemoryRow, measure_memory
from pipo.bench.memory_run import measure
from pipo.bench.subjects import Setting, Subject, open_subjects
from pipo.bench.throughput import Load, LoadRow, run_load
from pipo.cli.main import app
from pipo.errors import ConfigError

TINY = ["--shape", "tiny", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="module")
def subjects() -> list[Subject]:
    return open_subjects(Setting(shape="tiny", dtype="float32", commit=0.5), max_num_seqs=2)


@pytest.mark.parametrize("load", [Load(concurrency=2, num_requests=5), Load(rate=1000.0, num_requests=3)])
def test_every_request_is_served_to_its_end(subjects: list[Subject], load: Load) -> None:
    """Breaks when a worker drops a request, or two answer the same one."""
    load = Load(**{**vars(load), "prompt_tokens": 6, "reply_tokens": 8})
    num_tokens = sum(reply for _, reply in load.lengths())
    for subject in subjects:
        row = run_load(subject, load)
        assert row.num_requests == load.num_requests
        assert row.tokens_per_s * row.seconds == pytest.approx(num_tokens)
        assert 0 < row.ttft_p50_s <= row.ttft_p90_s <= row.ttft_p99_s <= row.seconds
        assert 0 < row.tpot_p50_s <= row.tpot_p99_s
    assert row.commit == pytest.approx(0.45, abs=0.2)  # drafts that max_tokens cuts off are not counted


def test_lengths_vary_and_are_the_same_each_time() -> None:
    load = Load(concurrency=1, num_requests=50, prompt_tokens=100, reply_tokens=10)
    prompts, replies = zip(*load.lengths(), strict=True)
    assert load.lengths() == load.lengths()
    assert 50 <= min(prompts) < 70
    assert 130 < max(prompts) <= 150
    assert min(replies) >= 5
    assert Load(concurrency=1, num_requests=2, prompt_tokens=7, reply_tokens=3, vary=0).lengths() == [(7, 3), (7, 3)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "a concurrency or a rate"),
        ({"concurrency": 0}, "concurrency must be at least 1, got 0"),
        ({"rate": 0.0}, "rate must be above 0"),
        ({"concurrency": 1, "vary": 1.0}, "vary is a share"),
        ({"concurrency": 1, "reply_tokens": 0}, "reply_tokens must be at least 1"),
    ],
)
def test_loads_that_can_t_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Load(**fields)


def test_the_throughput_command(tmp_path: Path) -> None:
    rows, page = tmp_path / "rows.json", tmp_path / "page.html"
    options = ["bench", "throughput", *TINY, "--concurrency", "1,2", "--prompt", "6", "--reply", "4", "--requests", "2"]
    shown = CliRunner().invoke(app, [*options, "--json", str(rows), "--report", str(page)])
    assert shown.exit_code == 0, shown.output
    assert "in flight" in shown.stdout
    results = read_results(rows, "throughput", LoadRow)
    assert [(row.concurrency, row.method) for row in results.rows] == [
        (1, "regular"),
        (1, "pipo"),
        (2, "regular"),
        (2, "pipo"),
    ]
    assert results.complete
    assert page.read_text().count("<svg") == 3


def test_both_kinds_of_load_at_once_are_refused() -> None:
    shown = CliRunner().invoke(app, ["bench", "throughput", *TINY, "--concurrency", "1", "--rate", "2"])
    assert shown.exit_code == 2
    assert "give one of them" in shown.output


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_is_what_the_entries_take() -> None:
    """PIPO holds half as many positions, in one layer more. Beyond that, caches hold room to grow."""
    setting = Setting(shape="tiny", dtype="float32", methods=("regular",))
    regular = measure(setting, Point(2, 64), num_steps=3)
    # 6 layers, keys and values, 4 heads of 32, 64 + 3 tokens (the last one is not read), 2 rows
    assert regular["predicted_bytes"] == 6 * 2 * 128 * 4 * (64 + 3) * 2
    assert 1 <= regular["cache_bytes"] / regular["predicted_bytes"] < 2
    assert regular["peak_bytes"] >= regular["cache_bytes"]
    weights = 4 * 1_000_000
    assert regular["resting_bytes"] > weights
    pipo = measure(Setting(shape="tiny", dtype="float32", methods=("pipo",)), Point(2, 64), num_steps=3)
    assert pipo["predicted_bytes"] == 7 * 2 * 128 * 4 * (32 + 3) * 2


def test_a_process_that_fails_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(shape="tiny", dtype="float32", methods=("regular",))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert measure_memory(setting, Point(1, 4), 1).error == "exit status 1"


def test_the_memory_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, page = tmp_path / "rows.json", tmp_path / "page.html"

    def measured(setting: Setting, point: Point, num_steps: int) -> MemoryRow:
        [method] = setting.methods or ()
        about: dict[str, Any] = {
            "method": method,
            "batch": point.batch,
            "context": point.context,
            "num_steps": num_steps,
        }
        if method == "pipo":
            return MemoryRow(**about, error="no room")
        return MemoryRow(
            **about, cache_bytes=3_000_000, predicted_bytes=2_000_000, peak_bytes=5_000_000, resting_bytes=1
        )

    monkeypatch.setattr(memory, "measure_memory", measured)
    options = ["bench", "memory", *TINY, "--batch", "1", "--context", "4,8", "--json", str(rows), "--report", str(page)]
    shown = CliRunner().invoke(app, options)
    assert shown.exit_code == 0, shown.output
    assert "5.0 MB" in shown.stdout
    assert "pipo, batch 1, context 8: no room" in shown.stdout
    assert json.loads(rows.read_text())["kind"] == "memory"
    assert len(read_results(rows, "memory", MemoryRow).rows) == 4
    assert page.read_text().count("<svg") == 2
