"""`pipo bench kernels`: every product of a layer, and figures that belong together. Nothing is timed here."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from pipo.bench import kernels
from pipo.bench.cost import Machine
from pipo.cli.main import app
from pipo.errors import ConfigError


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BEYOND_CACHES_BYTES", 2**20)
    monkeypatch.setattr(kernels, "measure_machine", lambda device, dtype: Machine("a machine", 1e10, 1e12, 2**30))


def test_every_product_of_a_layer_and_the_head() -> None:
    costs, machine = kernels.bench_kernels("tiny", [1, 3], rounds=2)
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "head"}
    assert {cost.name for cost in costs} == names
    assert [cost.rows for cost in costs if cost.name == "head"] == [1, 3]
    assert machine.name == "a machine"
    for cost in costs:
        assert min(cost.ours_s, cost.torch_s, cost.floor_s) > 0


def test_the_command_prints_what_was_measured() -> None:
    done = CliRunner().invoke(app, ["bench", "kernels", "--shape", "tiny", "--rows", "2", "--rounds", "1", "--json"])
    assert done.exit_code == 0, done.output
    assert {row["rows"] for row in json.loads(done.output)["products"]} == {2}


def test_what_can_not_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        kernels.bench_kernels("tiny", [0])
    with pytest.raises(ConfigError, match="the shapes are"):
        kernels.bench_kernels("nothing", [1])
    done = CliRunner().invoke(app, ["bench", "kernels", "--rows", "few"])
    assert done.exit_code == 2
    assert torch.get_num_threads() > 0
