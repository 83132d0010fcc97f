"""Predictions of `pipo plan` beside what `pipo bench latency` measured, and how far off they are."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from transformers import PreTrainedConfig

from pipo.bench.cost import COST_METHODS, Machine
from pipo.bench.deployment import Deployment, Efficiency
from pipo.bench.grid import Results, Row, read_results
from pipo.bench.latency import best_of
from pipo.errors import DataError


@dataclass(frozen=True)
class Figure:
    """A predicted number beside the measured one: seconds, or a ratio."""

    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted / self.measured - 1

    def as_row(self) -> dict[str, float]:
        """As JSON."""
        return {**asdict(self), "error": self.error}


@dataclass(frozen=True)
class Comparison:
    """One row of a benchmark. None: it was not measured."""

    method: str
    batch: int
    context: int
    draft_vocab: int | None
    ttft: Figure | None
    tpot: Figure | None
    against_regular: Figure | None = None
    """Regular decoding's time per token over this one's at the same point: what is assumed of the machine cancels out of it, nearly."""

    def as_row(self) -> dict[str, Any]:
        """As JSON."""
        return {name: value.as_row() if isinstance(value, Figure) else value for name, value in vars(self).items()}


def read_latency(path: Path) -> Results[Row]:
    """The results of `pipo bench latency --json FILE`.

    Raises:
        DataError: another file, or one without the machine's measured limits.
    """
    results = read_results(path, "latency", Row)
    if results.machine is None:
        raise DataError(f"{path} does not say what its machine was measured to do, so nothing can be predicted for it")
    return results


def machine_of(results: Results[Row]) -> Machine:
    """The machine at its better of the two times that it was measured: what the benchmark's own floors are of."""
    assert results.machine is not None
    first = Machine(**results.machine)
    return first if results.machine_after is None else best_of(first, Machine(**results.machine_after))


def compare(results: Results[Row], config: PreTrainedConfig, efficiency: Efficiency | None = None) -> list[Comparison]:
    """Predict each measured row of a method that the cost model knows, on the machine as it was measured in the same run.

    Raises:
        DataError: no such row.
    """
    deployment = Deployment(config, machine_of(results), dtype=results.dtype, efficiency=efficiency)
    known = [row for row in results.rows if row.method in COST_METHODS and row.error is None]
    if not known:
        raise DataError(
            f"these results hold no measured row of {', '.join(COST_METHODS)}, so there is nothing to compare"
        )
    rows = [_comparison(deployment, row) for row in known]
    regular = {(row.batch, row.context): row.tpot for row in rows if row.method == "regular"}
    return [replace(row, against_regular=_ratio(regular.get((row.batch, row.context)), row.tpot)) for row in rows]


def _ratio(regular: Figure | None, own: Figure | None) -> Figure | None:
    if regular is None or own is None:
        return None
    return Figure(regular.predicted / own.predicted, regular.measured / own.measured)


def _comparison(deployment: Deployment, row: Row) -> Comparison:
    if row.bytes_per_s is not None:  # what the benchmark's own floor is of
        deployment = copy.copy(deployment)
        deployment.machine = replace(deployment.machine, bytes_per_s=row.bytes_per_s)
    commit = 0.0 if row.commit is None else row.commit
    drafts = commit, row.draft_vocab
    first = deployment.prefill(row.method, row.batch, row.context, *drafts)
    step, num_tokens = deployment.decode(row.method, row.batch, row.middle or row.context, *drafts)
    return Comparison(
        row.method,
        row.batch,
        row.context,
        row.draft_vocab,
        None if row.ttft_s is None else Figure(first.seconds, row.ttft_s),
        None if row.tpot_s is None else Figure(step.seconds / num_tokens, row.tpot_s),
    )


def median_error(figures: Sequence[Figure | None]) -> float | None:
    """The median of the errors' sizes; None where nothing was measured."""
    sizes = [abs(figure.error) for figure in figures if figure is not None]
    return median(sizes) if sizes else None
