"""What the CPU kernels reach: products of few rows with a layer's weights and the head's, ours beside PyTorch's and the machine's limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from pipo.bench.cost import Machine
from pipo.bench.machine import measure_machine
from pipo.errors import ConfigError
from pipo.kernels.cpu import linear
from pipo.kernels.pages import advise
from pipo.model.shapes import base_without_weights, shape_config

BEYOND_CACHES_BYTES = 2**28
"""So many bytes of weights are multiplied before the same come again."""


@dataclass(frozen=True)
class ProductCost:
    """One product: `rows` of inputs by `[outputs, inputs]` of bfloat16. Seconds are medians; `floor_s` is what the machine allows."""

    name: str
    outputs: int
    inputs: int
    rows: int
    ours_s: float
    torch_s: float
    floor_s: float

    @property
    def weight_bytes(self) -> int:
        """Of the weights, which are read once."""
        return 2 * self.outputs * self.inputs


def bench_kernels(
    shape: str, rows: Sequence[int], *, rounds: int = 7, report: Callable[[], None] = lambda: None
) -> tuple[list[ProductCost], Machine]:
    """Every product of a layer of `shape` and its head, for each number of rows; and the machine, measured at once.

    Args:
        report: called after each product.

    Raises:
        ConfigError: a number below 1, or no such shape. KernelError: the kernels can't be compiled here.
    """
    if min(rows) < 1 or rounds < 1:
        raise ConfigError(f"rows and rounds must be at least 1, got {min(*rows, rounds)}")
    products = products_of(shape)
    machine = measure_machine("cpu", torch.bfloat16)
    costs = []
    with torch.no_grad():
        for name, (outputs, inputs) in products.items():
            weights = _weights(outputs, inputs)
            for number in rows:
                x = torch.randn(number, inputs).bfloat16()
                ours, stock = _compare([partial(linear, x), partial(F.linear, x)], weights, rounds)
                bytes_s = 2 * (outputs * inputs + number * (outputs + inputs)) / machine.bytes_per_s
                floor_s = max(bytes_s, 2 * number * outputs * inputs / machine.flops_per_s)
                costs.append(ProductCost(name, outputs, inputs, number, ours, stock, floor_s))
                report()
            del weights
    return costs, machine


def products_of(shape: str) -> dict[str, tuple[int, int]]:
    """Name → `(outputs, inputs)` of the last layer's linear modules and the head's."""
    model = base_without_weights(shape_config(shape))
    layer = model.backbone.decoder.layers[-1]
    found = {name.rpartition(".")[2]: m for name, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
    return {name: (m.out_features, m.in_features) for name, m in [*found.items(), ("head", model.lm_head)]}


def _weights(outputs: int, inputs: int) -> list[Tensor]:
    """Enough matrices that none is in a cache when its turn comes again."""
    number = max(1, -(-BEYOND_CACHES_BYTES // (2 * outputs * inputs)))
    arena = torch.empty(number, outputs, inputs, dtype=torch.bfloat16)
    advise(arena)
    arena.copy_(torch.randn(outputs, inputs).bfloat16())
    return list(arena)


def _compare(ways: Sequence[Callable[[Tensor], Tensor]], weights: Sequence[Tensor], rounds: int) -> list[float]:
    """Median seconds of one product by each way; the ways take turns."""
    seconds: list[list[float]] = [[] for _ in ways]
    for turn in range(rounds + 1):
        for number, way in enumerate(ways):
            start = time.perf_counter()
            for weight in weights:
                way(weight)
            if turn:
                seconds[number].append((time.perf_counter() - start) / len(weights))
    return [median(times) for times in seconds]
