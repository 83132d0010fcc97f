"""What a benchmark's file holds, and how it is read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipo.bench.grid import Point, Results, Row, check_writable, grid_points, read_results, write_results
from pipo.errors import ConfigError, DataError


def row(method: str = "pipo") -> Row:
    return Row.from_rounds(method, Point(2, 16), [0.3, 0.1, 0.2], [0.05, 0.04, 0.04], commit=0.5, num_steps=8)


def test_a_row_has_medians_and_spreads() -> None:
    """Breaks when tokens per second are those of one request, or a spread is not relative."""
    found = row()
    assert (found.ttft_s, found.tpot_s, found.tokens_per_s) == (0.2, 0.04, 50.0)
    assert found.spread == pytest.approx(0.25)
    assert found.ttft_spread == pytest.approx(1.0)


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    """Breaks when a field is lost on the way, or `pipo plan --against` would not find what it reads."""
    failed = Row(method="vllm", batch=1, context=16, error="not installed")
    results = Results(kind="latency", shape="tiny", device="cpu", dtype="float32", rows=(row(), failed), complete=True)
    path = tmp_path / "rows.json"
    write_results(path, results)
    again = read_results(path, "latency", Row)
    assert again.rows == results.rows
    assert (again.shape, again.complete) == ("tiny", True)
    top = json.loads(path.read_text())
    assert {"arguments", "git_revision", "versions", "hardware", "machine", "dtype"} <= top.keys()
    assert {"method", "batch", "context", "ttft_s", "tpot_s", "tokens_per_s", "floor_s", "ceiling", "spread"} <= top[
        "rows"
    ][0].keys()


@pytest.mark.parametrize("text", ["", "[]", '{"kind": "memory"}', '{"kind": "latency"}'])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"rows\.json"):
        read_results(path, "latency", Row)


def test_points_come_sorted_and_once() -> None:
    assert grid_points([4, 1, 4], [8]) == [Point(1, 8), Point(4, 8)]
    with pytest.raises(ConfigError, match="batch must be at least 1, got 0"):
        grid_points([1, 0], [8])
    with pytest.raises(ConfigError, match="context must be at least 1, got nothing"):
        grid_points([1], [])


def test_a_file_that_can_t_be_written_is_told_before_the_run(tmp_path: Path) -> None:
    check_writable([None, tmp_path / "new.json"])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="is a folder"):
        check_writable([tmp_path])
    with pytest.raises(ConfigError, match="there is no folder"):
        check_writable([tmp_path / "missing" / "rows.json"])
