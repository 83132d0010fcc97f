"""What a machine is measured to do, on buffers small enough for a test; the figures mean nothing here."""

from __future__ import annotations

import pytest
import torch

from pipo.bench import machine
from pipo.errors import ConfigError


@pytest.fixture
def _small(monkeypatch):
    monkeypatch.setattr(machine, "BUFFER_BYTES", {"cpu": 2**20, "cuda": 2**20})
    monkeypatch.setattr(machine, "MATRICES", {"cpu": ((8, 16, 32), (16, 16, 16))})


@pytest.mark.usefixtures("_small")
def test_the_best_way_counts(monkeypatch):
    """A limit that is the first way's, or the worst one's, is none: some method would be faster than its floor."""
    monkeypatch.setattr(machine, "measure_reading", lambda *args: {"sum": 5.0, "dot": 9.0, "largest": 7.0})
    monkeypatch.setattr(machine, "measure_products", lambda *args: {(1, 1, 1): 3.0, (2, 2, 2): 2.0})
    found = machine.measure_machine("cpu", torch.float32)
    assert (found.bytes_per_s, found.flops_per_s, found.overhead_s) == (9.0, 3.0, 0.0)
    assert found.memory_bytes > 2**27
    assert f"{torch.get_num_threads()} thread" in found.name


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("dtype", machine.MEASURED_DTYPES)
def test_each_number_format_is_measured(dtype, monkeypatch):
    """Bytes by seconds, operations by seconds: with a clock that says one second for everything, they are the bytes and the operations."""
    monkeypatch.setattr(machine, "_seconds", lambda work, device: (work(), 1.0)[1])
    cpu = torch.device("cpu")
    assert set(machine.measure_reading(cpu, dtype).values()) == {2**20}
    assert machine.measure_products(cpu, dtype) == {(8, 16, 32): 2 * 8 * 16 * 32, (16, 16, 16): 2 * 16**3}


@pytest.mark.parametrize(("device", "dtype", "named"), [("meta", torch.float32, "meta"), ("cpu", torch.int8, "int8")])
def test_what_is_not_measured_is_refused(device, dtype, named):
    with pytest.raises(ConfigError, match=named):
        machine.measure_machine(device, dtype)
