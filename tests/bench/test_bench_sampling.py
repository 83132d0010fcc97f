"""`pipo bench sampling`: which figures it gives, and what it says of numbers that can't be."""

import json

import pytest
from typer.testing import CliRunner

from pipo.bench.sampling import REQUESTS, bench_sampling
from pipo.cli.main import app
from pipo.errors import ConfigError


def test_every_request_is_measured_at_every_size():
    costs = bench_sampling([50, 2000], [1, 3], rounds=2)
    assert [(c.vocab_size, c.batch, c.request) for c in costs] == [
        (v, b, request) for v in (50, 2000) for b in (1, 3) for request in REQUESTS
    ]
    assert all(len(cost.seconds) == 2 and min(cost.seconds) > 0 for cost in costs)


def test_figures_as_a_table_and_as_json():
    arguments = ["bench", "sampling", "--vocab", "50", "--batch", "1,2", "--rounds", "1"]
    table = CliRunner().invoke(app, arguments)
    assert all(request in table.stdout for request in REQUESTS)
    rows = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert len(rows) == 2 * len(REQUESTS)
    assert {"request", "vocab_size", "batch", "seconds", "median_s"} == set(rows[0])


@pytest.mark.parametrize(
    "wrong", [{"vocab_sizes": [0]}, {"batches": [0]}, {"rounds": 0}, {"deviation": 0.0}, {"device": "cuda"}]
)
def test_numbers_that_cannot_be(wrong):
    import torch

    if "device" in wrong and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match=next(iter(wrong)).split("_")[0].removesuffix("es")):
        bench_sampling(**{"vocab_sizes": [50], "batches": [1], **wrong})
