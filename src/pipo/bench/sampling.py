"""What it takes to make a token of logits: one draw for every row of a batch, by what the rows ask for.

Shape legend: B rows, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from pipo.engine.request import SamplingParams
from pipo.errors import ConfigError
from pipo.model.rows import Rows
from pipo.model.sampling import SamplingBatch, TokenHistory

REQUESTS = {
    "greedy": SamplingParams(temperature=0, threshold=1),
    "temperature": SamplingParams(threshold=1),
    "top-k, top-p": SamplingParams(temperature=0.6, top_p=0.95, top_k=20, threshold=1),
    "top-p": SamplingParams(top_p=0.95, threshold=1),
    "min-p": SamplingParams(min_p=0.05, threshold=1),
    "top-k, top-p, presence penalty": SamplingParams(top_p=0.95, top_k=20, presence_penalty=1.5, threshold=1),
    "top-p, all penalties": SamplingParams(
        top_p=0.95, presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.1, threshold=1
    ),
}
"""What is measured, by name."""

WRITTEN = 1000
"""Tokens that each row has written, where penalties count them."""


@dataclass(frozen=True)
class SamplingCost:
    """Seconds of one draw for all rows of a batch: by the clock on a GPU; on a CPU, processor time by the number of threads, so
    that other work on the machine does not count."""

    request: str
    vocab_size: int
    batch: int
    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """Over the rounds."""
        return median(self.seconds)


def bench_sampling(
    vocab_sizes: Sequence[int],
    batches: Sequence[int],
    *,
    device: str = "cpu",
    deviation: float = 3.0,
    rounds: int = 20,
    report: Callable[[], None] = lambda: None,
) -> list[SamplingCost]:
    """The cost of each of :data:`REQUESTS` for each vocabulary and batch, on normally distributed logits.

    Args:
        deviation: of the logits. At 3, 95% of the probability is held by a tenth of the tokens: far more than a model's.
        report: called after each measurement.

    Raises:
        ConfigError: a number that can't be, or no such device here.
    """
    for name, values in (("vocab", vocab_sizes), ("batch", batches), ("rounds", [rounds])):
        if min(values) < 1:
            raise ConfigError(f"{name} must be at least 1, got {min(values)}")
    if not deviation > 0:
        raise ConfigError(f"deviation must be above 0, got {deviation}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, and torch finds no GPU here")
    costs = []
    for vocab_size in vocab_sizes:
        for batch in batches:
            for request in REQUESTS:
                seconds = _measure(request, vocab_size, batch, torch.device(device), deviation, rounds)
                costs.append(SamplingCost(request, vocab_size, batch, seconds))
                report()
    return costs


@torch.inference_mode()
def _measure(
    request: str, vocab_size: int, num_rows: int, device: torch.device, deviation: float, rounds: int
) -> tuple[float, ...]:
    generator = torch.Generator().manual_seed(0)
    logits_BV = (torch.randn(num_rows, vocab_size, generator=generator) * deviation).to(device)
    batch = SamplingBatch.build([REQUESTS[request]] * num_rows, range(num_rows), vocab_size, device)
    history = None
    if batch.any_penalty:
        texts = torch.randint(vocab_size, (2, num_rows, WRITTEN), generator=generator).tolist()
        history = TokenHistory(batch, *texts)
    position_B = torch.zeros(num_rows, dtype=torch.int64, device=device)
    seconds = []
    for number in range(2 + rounds):
        start = _now(device)
        rows = Rows(batch, history, position_B + number, None)
        rows.count(rows.draw(logits_BV)[0])
        seconds.append(_now(device) - start)
    return tuple(seconds[2:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()
